"""`lm-eval`: tasks of lm-evaluation-harness, unsteered and steered."""

import json
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import sae_query_steer as sqs
from sae_query_steer.arguments import check_number
from sae_query_steer.cli.options import Model, Optional, say, show
from sae_query_steer.cli.steer import DescentOptions
from sae_query_steer.storage.folders import check_holds


def lm_eval(
    *,
    model: Model,
    output: Optional,
    bundle: Path,
    tasks: str,
    include_path: Path | None = None,
    target: str | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    chat_template: bool = False,
) -> None:
    """Evaluate a model on tasks of lm-evaluation-harness, unsteered and steered.

    The steerer is the bundle's. If the bundle has none, it goes to --target as `steer` does. Needs
    the extra lm-eval. Tasks of your own whose data are local files ask nothing of the network;
    those of the harness load their data from the hub.

    Args:
        model: the language model.
        output: the folder of results.json.
        bundle: Folder that `bundle` wrote.
        tasks: Names of tasks or groups, with commas between.
        include_path: Folder with tasks of your own (YAML).
        target: Class to steer towards; the bundle's if unset.
        limit: Documents of each task; all if unset.
        num_fewshot: Examples in each prompt; the task's own number if unset.
        batch_size: Rows of a forward pass.
        chat_template: Use the tokenizer's chat template.
    """
    output.check("results.json")
    check_holds(bundle, "bundle.json", "a folder that bundle wrote")
    if include_path is not None and not include_path.is_dir():
        raise FileNotFoundError(f"no folder {include_path}: give --include-path a folder of YAML")
    for name, value in {"--limit": limit, "--batch-size": batch_size}.items():
        if value is not None:
            check_number(name, value, whole=True, least=1)
    from sae_query_steer.integrations.lm_eval import SteeredLM

    harness = import_module("lm_eval")
    names = tasks.split(",")
    manager = _tasks(names, include_path)
    loaded = model.load()
    steerer = _steerer(sqs.hub.load_bundle(bundle, model=loaded), target)
    found = {
        which: harness.simple_evaluate(
            model=SteeredLM(loaded, one, batch_size=batch_size),
            tasks=names,
            task_manager=manager,
            limit=limit,
            num_fewshot=num_fewshot,
            apply_chat_template=chat_template,
            log_samples=False,
        )
        for which, one in {"unsteered": None, "steered": steerer}.items()
    }
    say(f"steered: {steerer!r}\n")
    show(_table(found))
    results = found | {"steerer": repr(steerer)}
    output.write({"results.json": json.dumps(results, indent=2, default=str)})


def _tasks(names: list[str], include_path: Path | None) -> Any:
    """Return the tasks there are; those of the harness, which take long to read, only if needed.

    Raises:
        ValueError: there is no task of a name.
    """
    from lm_eval.tasks import TaskManager

    for include_defaults in (False, True):
        manager = TaskManager(include_path=include_path, include_defaults=include_defaults)
        if not (unknown := set(names) - set(manager.all_tasks)):
            return manager
    raise ValueError(
        f"--tasks must name tasks of the harness or in --include-path, got {sorted(unknown)}"
    )


def _steerer(bundle: "sqs.hub.Bundle", target: str | None) -> Any:
    """Return the steerer of a bundle towards a target, or one with the defaults of `steer`.

    Raises:
        ValueError: there is no steerer and no target, or no such class.
    """
    if bundle.steerer is not None:
        if target is None:
            return bundle.steerer
        if not isinstance(bundle.steerer, sqs.LatentGradientSteerer):
            raise ValueError(f"--target must not be given with {bundle.steerer!r}, got {target!r}")
        return replace(bundle.steerer, target=target)
    if bundle.targets is None:
        raise ValueError("--bundle must hold a steerer or centroids, got one without either")
    if target is None:
        raise ValueError(
            "--target must be given, because the bundle holds no steerer: one of "
            f"{list(bundle.targets.classes)}"
        )
    return DescentOptions().over(bundle.saes, bundle.targets, target)


def _table(found: dict[str, Any]) -> Any:
    """Return a row for each task, filter and metric, unsteered beside steered."""
    import pandas as pd

    rows = []
    for task, values in found["unsteered"]["results"].items():
        for name in (name for name in values if "," in name and "_stderr," not in name):
            metric, filter_ = name.split(",")
            row = {"task": task, "filter": filter_, "metric": metric}
            for which, results in found.items():
                row[which] = results["results"][task][name]
                row[f"{which}_stderr"] = results["results"][task].get(f"{metric}_stderr,{filter_}")
            rows.append(row)
    return pd.DataFrame(rows)
