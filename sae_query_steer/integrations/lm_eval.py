"""`SteeredLM`: a model under a steerer, for the tasks of lm-evaluation-harness."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sae_query_steer.arguments import check_kind, check_number
from sae_query_steer.baselines.biases import LogitBias
from sae_query_steer.compare.generation import continuations
from sae_query_steer.data.prompts import bos_id, tokenizer_of
from sae_query_steer.models.activations import LOGITS, read_activations
from sae_query_steer.progress import progress_bar
from sae_query_steer.scopes.joins import Not
from sae_query_steer.scopes.marked import AtPositions, RowMask
from sae_query_steer.steering.edit import Edit
from sae_query_steer.steering.steerer import AnySteerer, JoinedSteerers, Steerer, parts_of

try:
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
except ImportError as error:
    raise ImportError(
        "sae_query_steer.integrations.lm_eval needs lm-eval 0.4.13 or newer: "
        'pip install "sae-query-steer[lm-eval]"'
    ) from error

BY_ROW = ("target", "n_steps", "step_size", "strength", "look_at")
"""Settings of edits of which a list has one value for each row."""

NEUTRAL = {"top_k": 0, "top_p": 1, "num_beams": 1, "repetition_penalty": 1}
"""Values of options that are not offered at which they change nothing."""


class SteeredLM(TemplateLM):
    """A model under a steerer, as a model of lm-evaluation-harness.

    >>> lm_eval.simple_evaluate(model=SteeredLM(model, steerer), tasks=["arc_easy"])

    The prompt of a request is its context: `LastPromptToken` steers the context's last token and
    `ResponseTokens` the continuation, in log-likelihoods as in generated text. The prompt of a
    rolling log-likelihood is the prefix token, and in later windows what was scored before. Results
    do not depend on the batch size.

    Without a steerer it scores and writes what the harness' own `hf` model does, if both begin
    texts with BOS (here by `model.cfg.default_prepend_bos`, there by the tokenizer). Contexts that
    are too long lose their first tokens, BOS among them.

    Args:
        model: a HookedTransformer or a TransformerBridge.
        steerer: what is evaluated; None evaluates the model as it is.
        batch_size: rows of a forward pass and of a call of `generate`.
        max_gen_toks: most tokens to generate where a task does not say.
        seed: of sampling. Each request has its own, so that repeats of a request differ.

    Raises:
        TypeError: no model of TransformerLens, or no steerer.
        ValueError: a model without tokenizer, a steerer of another model or with a value for each
            row, or a number out of range.
    """

    tokenizer: Any

    def __init__(
        self,
        model: Any,
        steerer: AnySteerer = None,
        *,
        batch_size: int = 8,
        max_gen_toks: int = 256,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer_of(model)
        check_number("batch_size", batch_size, whole=True, least=1)
        check_number("max_gen_toks", max_gen_toks, whole=True, least=1)
        if steerer is not None:
            check_kind("steerer", steerer, (Steerer, JoinedSteerers), "None evaluates the model")
        for part in parts_of(steerer):
            _check_rows_are_equal(part)
            part.check_model(model)
        self._model, self._steerer, self._seed = model, steerer, seed
        self.batch_size, self.max_gen_toks = batch_size, max_gen_toks
        self._device = torch.device(model.cfg.device)

    @property
    def max_length(self) -> int:
        """Tokens of the model's context."""
        return int(self._model.cfg.n_ctx)

    @property
    def eot_token_id(self) -> int:
        """Id of EOS."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """Id of the token before an empty context and before rolling texts: BOS, or else EOS."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer, for the harness' cache of requests."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return turns in the tokenizer's chat template, with special tokens.

        Args:
            chat_history: the turns.
            add_generation_prompt: begin the model's turn; False continues the last of the turns.
        """
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Return the ids of a text, with BOS where the model's prompts begin with it, and once.

        Args:
            string: the text.
            add_special_tokens: False leaves BOS out.
            kwargs: not used.
        """
        del kwargs
        ids = self.tokenizer.encode(string, add_special_tokens=False, verbose=False)
        bos = None if add_special_tokens is False else bos_id(self._model)
        return ids if bos is None or ids[:1] == [bos] else [bos, *ids]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each continuation, in nats, and whether it is greedy.

        Args:
            requests: texts for the cache, or None, and the tokens of context and continuation.
            kwargs: `disable_tqdm`.

        Raises:
            ValueError: a continuation without tokens, or longer than the model's context.
        """
        n_ctx, found = self.max_length, [(0.0, False)] * len(requests)
        # Continuations that differ in their last token share a pass, which does not read it.
        passes: dict[tuple[tuple[int, ...], int], list[int]] = {}
        for index, (_, context, continuation) in enumerate(requests):
            if not 1 <= (n := len(continuation)) <= n_ctx:
                raise ValueError(
                    f"continuations must have 1 to {n_ctx} tokens, the model's context, got {n}: "
                    "shorten those of the task"
                )
            read = (*context, *continuation)[-n_ctx - 1 : -1]
            passes.setdefault((read, n), []).append(index)
        for some in self._batches(passes, lambda one: len(one[0]), "Log-likelihoods", kwargs):
            for one, log_probs in zip(some, self._log_probs(some), strict=True):
                for index in passes[one]:
                    texts, _, continuation = requests[index]
                    own = torch.tensor(continuation)
                    score = float(log_probs.gather(1, own[:, None]).sum())
                    found[index] = score, bool((log_probs.argmax(-1) == own).all())
                    if texts is not None:
                        self.cache_hook.add_partial("loglikelihood", texts, found[index])
        return found

    @torch.no_grad()
    def _log_probs(
        self, passes: Sequence[tuple[tuple[int, ...], int]]
    ) -> Iterator[Float[Tensor, "token d_vocab"]]:
        """Yield the log probabilities of the last n next tokens of rows (tokens, n)."""
        rows = [torch.tensor(tokens) for tokens, _ in passes]
        steering: AbstractContextManager[Any] = nullcontext()
        if self._steerer is not None:
            lengths = [len(tokens) - n + 1 for tokens, n in passes]
            steering = self._steerer.apply(self._model, prompt_lengths=lengths)
        with steering:
            tokens = pad_sequence(rows, batch_first=True)
            logits = read_activations(self._model, tokens, [LOGITS])[LOGITS]
        for row, (tokens, n) in zip(logits, passes, strict=True):
            yield row[len(tokens) - n : len(tokens)].float().log_softmax(-1).cpu()

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of whole texts, in nats.

        A text is scored in windows of the model's context, each token once, and is the response to
        the prefix token. Where the tokenizer writes BOS by itself, the harness' `hf` model scores
        that too, after the prefix token; here BOS comes once, as in `hf` with add_bos_token=False.

        Args:
            requests: the texts, as instances of the harness.
            disable_tqdm: show no progress.
        """
        windows, owners = [], []
        for index, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            rolling = utils.get_rolling_token_windows(
                tokens, self.prefix_token_id, self.max_length, context_len=1
            )
            for window in rolling:
                windows.append((None, *utils.make_disjoint_window(window)))
                owners.append(index)
        sums = [0.0] * len(requests)
        scores = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        for index, (score, _) in zip(owners, scores, strict=True):
            sums[index] += score
        return sums

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Return what the model writes after each context, up to the first of its stop texts.

        Args:
            requests: contexts and options, as instances of the harness: `until`, `max_gen_toks`,
                `do_sample`, `temperature`.
            disable_tqdm: show no progress.

        Raises:
            ValueError: other options, or as many tokens as the model's context.
        """
        groups: dict[Any, list[tuple[int, str]]] = {}
        for index, request in enumerate(requests):
            context, given = request.args
            until, most, temperature = self._options(given)
            ids = self.tok_encode(context)
            as_it_is = ids == self.tok_encode(context, add_special_tokens=False)
            if len(ids) > self.max_length - most:
                context, as_it_is = self._end_of(ids, self.max_length - most), True
            group = until, most, temperature, as_it_is
            groups.setdefault(group, []).append((index, context))
        found = [""] * len(requests)
        silent = {"disable_tqdm": disable_tqdm}
        for (until, most, temperature, as_it_is), rows in groups.items():
            for some in self._batches(rows, lambda row: len(row[1]), "Generation", silent):
                made = continuations(
                    self._model,
                    [context for _, context in some],
                    max_new_tokens=most,
                    steerer=self._steerer,
                    batch_size=self.batch_size,
                    temperature=temperature,
                    seeds=None if temperature is None else [self._seed + i for i, _ in some],
                    prepend_bos=False if as_it_is else None,
                    until=until,
                )
                for (index, _), text in zip(some, made.texts, strict=True):
                    found[index] = postprocess_generated_text(text, list(until), None)
                    args = requests[index].args
                    self.cache_hook.add_partial("generate_until", args, found[index])
        return found

    def _options(self, given: Mapping[str, Any]) -> tuple[tuple[str, ...], int, float | None]:
        """Return stop texts, most tokens, and the temperature of sampling."""
        options: dict[str, Any] = dict(normalize_gen_kwargs(dict(given), self.max_gen_toks))
        until, most = tuple(options.pop("until")), options.pop("max_gen_toks")
        samples, temperature = options.pop("do_sample"), options.pop("temperature", 0.0)
        for name, value in options.items():
            greedy = not samples and name in ("top_k", "top_p")
            if not greedy and value not in (None, NEUTRAL.get(name)):
                raise ValueError(
                    f"generation options must be until, max_gen_toks, do_sample and temperature, "
                    f"got {name}={value!r}: leave it out of the task's generation_kwargs"
                )
        check_number("max_gen_toks", most, whole=True, least=1, most=self.max_length - 1)
        return until, most, float(temperature) if samples else None

    def _end_of(self, ids: list[int], most: int) -> str:
        """Return a text of at most so many tokens that ends as some tokens do."""
        for kept in range(most, 0, -1):
            text = self.tokenizer.decode(ids[-kept:], clean_up_tokenization_spaces=False)
            if len(self.tok_encode(text, add_special_tokens=False)) <= most:
                return text
        return ""

    def _batches(self, rows: Any, length: Any, what: str, options: Any) -> Iterator[list[Any]]:
        """Yield batches, longest rows first, with a progress bar."""
        ordered = sorted(rows, key=length, reverse=True)
        silent = bool(options.get("disable_tqdm"))
        with progress_bar(total=len(ordered), desc=what, unit="row", disable=silent) as bar:
            for start in range(0, len(ordered), self.batch_size):
                some = ordered[start : start + self.batch_size]
                yield some
                bar.update(len(some))


def _check_rows_are_equal(steerer: Steerer) -> None:
    """Raise ValueError if a steerer has a value for each row of a batch."""
    own = vars(steerer if isinstance(steerer, LogitBias) else steerer.edit)
    inner = [vars(value) for value in own.values() if isinstance(value, Edit)]
    given = [(name, held.get(name)) for held in (own, *inner) for name in BY_ROW]
    # A tuple of places to look at is for all rows.
    kinds = {"look_at": list}
    given = [(n, value) for n, value in given if isinstance(value, kinds.get(n, list | tuple))]
    scopes: list[Any] = [own["scope"] if isinstance(steerer, LogitBias) else steerer.where.scope]
    for scope in scopes:
        scopes += [scope.scope] if isinstance(scope, Not) else getattr(scope, "scopes", ())
        rows = isinstance(scope, AtPositions) and isinstance(tuple(scope.positions)[0], tuple)
        given += [("scope", scope)] if rows or isinstance(scope, RowMask) else []
    for name, value in given:
        raise ValueError(
            f"{name} must be the same for all rows, got {value!r:.100}: the harness chooses the "
            "rows of a batch, so evaluate a steerer for each value"
        )
