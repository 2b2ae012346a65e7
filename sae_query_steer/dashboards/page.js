const started = performance.now();
const data = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
const ROW = 48, FIRST = 5, words = data.vocabulary, perHead = data.heads[0].fired.length;
let shown = [], chosen = -1;

// An item is the index of its head times the latents of a head, plus its latent.
const headOf = (item) => data.heads[Math.floor(item / perHead)];
const latentOf = (item) => item % perHead;
const value = (item, column) => headOf(item)[column][latentOf(item)];
const density = (item) => value(item, "fired") / Math.max(1, data.n_tokens);
const hash = (item) => `#${headOf(item).head}-${latentOf(item)}`;
const pieces = (text) => data.texts[text[1]].slice(text[3], text[3] + text[4]).map((i) => words[i]);
const topWord = (text) => words[data.texts[text[1]][text[2]]];
const every = (list, step, from = 0) => list.filter((_, i) => i >= from && (i - from) % step === 0);

function topWords(item) {
  return [...new Set(value(item, "texts").map(topWord))];
}

const ORDERS = [
  ["max", "largest activation", (item) => -value(item, "max"), true],
  ["density", "density", (item) => -value(item, "fired"), true],
  ["class", "tells classes apart", (item) => -value(item, "share"), data.classes !== null],
  ["moved", "attention it moves", (item) => -value(item, "moved"), data.has_attention],
  ["latent", "latent number", (item) => latentOf(item), true],
].filter(([, , , there]) => there);

const CONTENTS = {
  texts: (item) => value(item, "texts").map((text) => pieces(text).join("")).join("\n"),
  tops: (item) => topWords(item).join("\n"),
  keys: (item) => (data.has_keys ? every(value(item, "keys"), 2).map((i) => words[i]).join("\n") : ""),
  class: (item) => (data.classes && value(item, "class") >= 0 ? data.classes[value(item, "class")] : ""),
};
const indexed = {};

function contents(scope, item) {
  const cache = (indexed[scope] = indexed[scope] || []);
  if (cache[item] === undefined) cache[item] = CONTENTS[scope](item).toLowerCase();
  return cache[item];
}

function update() {
  const begun = performance.now();
  const query = at("search").value.toLowerCase(), scope = at("scope").value;
  const head = at("head").value, order = ORDERS.find(([name]) => name === at("order").value)[2];
  const wanted = (item) => {
    if (head !== "all" && String(headOf(item).head) !== head) return false;
    if (!at("dead").checked && value(item, "fired") === 0) return false;
    if (!query) return true;
    if (String(latentOf(item)) === query.trim()) return true;
    return scope !== "latent" && contents(scope, item).includes(query);
  };
  const all = Array.from({ length: data.heads.length * perHead }, (_, i) => i);
  const keys = new Map();
  shown = all.filter(wanted);
  for (const item of shown) keys.set(item, order(item));
  shown.sort((a, b) => keys.get(a) - keys.get(b) || a - b);
  at("count").textContent = `${shown.length.toLocaleString("en")} of ${all.length.toLocaleString("en")} latents`;
  at("rows").style.height = `${shown.length * ROW}px`;
  at("list").scrollTop = 0;
  drawRows();
  document.documentElement.dataset.searchMs = (performance.now() - begun).toFixed(1);
}

// Only the rows in sight are in the document.
function drawRows() {
  const list = at("list"), first = Math.max(0, Math.floor(list.scrollTop / ROW) - 4);
  const last = Math.min(shown.length, first + Math.ceil((list.clientHeight || 600) / ROW) + 8);
  at("rows").replaceChildren(...shown.slice(first, last).map((item, i) => listRow(item, first + i)));
  if (!shown.length) at("rows").append(make("p", { cls: "empty" }, "No latent matches. Silent latents are shown only if you tick them."));
  const active = shown.indexOf(chosen);
  if (active >= first && active < last) list.setAttribute("aria-activedescendant", `row-${chosen}`);
  else list.removeAttribute("aria-activedescendant");
}

function listRow(item, index) {
  const fired = value(item, "fired"), label = data.classes ? value(item, "class") : -1;
  return make(
    "div",
    {
      cls: fired ? "row" : "row silent", id: `row-${item}`, role: "option", style: { top: `${index * ROW}px` },
      "aria-selected": String(item === chosen), "aria-setsize": shown.length, "aria-posinset": index + 1,
      onclick: () => choose(item, true),
    },
    make(
      "div", {},
      make("span", {}, make("span", { cls: "name" }, `${headOf(item).head}·${latentOf(item)}`),
        label >= 0 ? make("span", { cls: "small" }, `  ${data.classes[label]} ${number(value(item, "share"))}`) : null),
      make("span", { cls: "small" }, fired ? share(density(item)) : "silent"),
    ),
    make("div", {}, make("span", { cls: "small tops" }, topWords(item).map(visible).join(" "))),
  );
}

function choose(item, scroll) {
  chosen = item;
  history.replaceState(null, "", hash(item));
  const index = shown.indexOf(item), list = at("list");
  if (index >= 0) {
    if (index * ROW < list.scrollTop) list.scrollTop = index * ROW;
    else if ((index + 1) * ROW > list.scrollTop + list.clientHeight) list.scrollTop = (index + 1) * ROW - list.clientHeight;
  }
  drawRows();
  at("detail").replaceChildren(...detail(item));
  at("detail").scrollTop = 0;
  if (scroll && matchMedia("(max-width:760px)").matches) at("detail").scrollIntoView();
}

function move(by) {
  if (!shown.length) return;
  const index = shown.indexOf(chosen);
  choose(shown[Math.max(0, Math.min(shown.length - 1, index < 0 ? 0 : index + by))]);
}

function detail(item) {
  const fired = value(item, "fired"), index = shown.indexOf(item);
  const fact = (name, text) => make("div", {}, make("dt", {}, name), make("dd", {}, text));
  const facts = make("dl", { cls: "facts" }, fact("fires at", `${share(density(item))} of tokens (${fired.toLocaleString("en")})`));
  if (fired) {
    facts.append(fact("largest", number(value(item, "max"))));
    facts.append(fact("mean where it fires", number((value(item, "mean") * data.n_tokens) / fired)));
  }
  if (data.has_attention && fired) facts.append(fact("moves", `${share(value(item, "moved"))} of attention`));
  if (data.classes && value(item, "class") >= 0) facts.append(fact("class explains", `${share(value(item, "share"))} of its variance`));
  const step = (text, by) => make("button", { type: "button", disabled: index + by < 0 || index + by >= shown.length || index < 0 ? "" : null, onclick: () => move(by) }, text);
  const title = make("div", { cls: "head" }, make("h2", {}, `Head ${headOf(item).head}, latent ${latentOf(item)}`), step("← previous", -1), step("next →", 1));
  const side = make("div", {}), main = make("div", { cls: "main" });
  if (fired) side.append(make("h3", {}, "Activations where it fires"), histogram(value(item, "histogram"), value(item, "max")));
  if (data.classes) side.append(...classPart(item));
  if (data.has_keys) side.append(...keyPart(item));
  if (fired) side.append(...codePart(item));
  main.append(...textPart(item));
  if (data.has_attention) main.append(...attentionPart(item));
  return [title, facts, make("div", { cls: "parts" }, side, main)];
}

function classPart(item) {
  const means = value(item, "class_means");
  return [
    make("h3", {}, "Mean by class"),
    bars(data.classes.map((name, i) => [name, means[i]]), value(item, "class")),
    make("p", { cls: "note" }, `Over ${data.span}. The class explains ${share(value(item, "share"))} of the variance; ${share(data.share_by_chance)} would be chance, and more for the best of many latents.`),
  ];
}

function codePart(item) {
  const latent = `{${latentOf(item)}: ${Number(value(item, "max").toPrecision(3))}}`;
  const where = `{"${data.site}": {${headOf(item).head}: ${latent}}}`;
  return [
    make("h3", {}, "Set it to its largest activation"),
    make("pre", { cls: "code" }, `sqs.steering.edit_latents(saes, ${where}, scope=sqs.scopes.EveryPosition())`),
  ];
}

function keyPart(item) {
  const keys = value(item, "keys"), size = value(item, "max") || 1;
  const pairs = every(keys, 2).map((word, i) => [visible(words[word]), keys[2 * i + 1] * size]);
  return [
    make("h3", {}, "Keys that its direction matches"),
    bars(pairs),
    make("p", { cls: "note" }, `Attention logit that it adds ${value(item, "max") ? "at its largest activation" : "at an activation of 1"}, beyond a mean key; mean over the token's keys in these texts` + (data.rotated ? "." : ", before rotary embedding: as at distance 0.")),
  ];
}

function textPart(item) {
  const texts = value(item, "texts");
  const line = (text) => {
    const activations = new Map();
    for (let i = 5; i < text.length; i += 2) activations.set(text[i], text[i + 1]);
    return make("li", {}, make("span", { cls: "act", title: `text ${text[1]}, position ${text[2]}` }, number(text[0])),
      shaded(pieces(text), activations, value(item, "max"), text[2] - text[3]));
  };
  const list = (some) => make("ol", { cls: "texts" }, ...some.map(line)), rest = texts.slice(FIRST);
  return [
    make("h3", {}, "Texts where it is most active"),
    texts.length ? list(texts.slice(0, FIRST)) : make("p", { cls: "note" }, "It fires at none of the tokens that were read."),
    rest.length ? make("details", {}, make("summary", {}, `${rest.length} more`), list(rest)) : "",
  ];
}

function attentionPart(item) {
  const looks = value(item, "attention"), texts = value(item, "texts");
  if (!looks.length) return [];
  const parts = [
    make("h3", {}, "Where its head looks, with the latent and without"),
    make("p", { cls: "note" }, "Attention from the top token to the tokens where it changes most; blue: as it is, grey: with the latent at 0."),
  ];
  looks.forEach((look, rank) => {
    const text = texts[rank], body = make("tbody", {});
    for (let i = 1; i < look.length; i += 3) {
      const [position, on, off] = look.slice(i, i + 3), bar = (size) => make("div", { style: { width: `${100 * size}%` } });
      const word = words[data.texts[text[1]][position]];
      body.append(make("tr", {}, make("td", { cls: "token", title: `position ${position}` }, visible(word)), make("td", { cls: "n small" }, String(position)),
        make("td", { cls: "pair" }, bar(on), bar(off)), make("td", { cls: "n" }, on.toFixed(3)), make("td", { cls: "n" }, off.toFixed(3)),
        make("td", { cls: "n" }, (on >= off ? "+" : "−") + Math.abs(on - off).toFixed(3))));
    }
    const where = `At ${visible(topWord(text)).trim()} (text ${text[1]}, position ${text[2]}): `;
    const header = make("tr", {}, ...["token", "position", "", "with", "without", "change"].map((name, i) => make("th", { scope: "col", cls: i === 1 || i > 2 ? "n" : null }, name)));
    parts.push(make("div", { cls: "look" }, make("p", {}, `${where}it moves ${share(look[0])} of the head's attention.`),
      look.length > 1 ? make("table", {}, make("thead", {}, header), body) : ""));
  });
  return parts;
}

function fromHash() {
  const found = /^#(\d+)-(\d+)$/.exec(location.hash);
  const head = found ? data.heads.findIndex((own) => String(own.head) === found[1]) : -1;
  return head >= 0 && Number(found[2]) < perHead ? head * perHead + Number(found[2]) : -1;
}

function setUp() {
  at("title").textContent = data.site;
  at("about").textContent = `${data.model}, layer ${data.layer}: ${data.heads.length} heads of ${perHead.toLocaleString("en")} latents, read over ${data.n_tokens.toLocaleString("en")} tokens of ${data.n_texts.toLocaleString("en")} texts.`;
  at("head").append(make("option", { value: "all" }, "all"), ...data.heads.map((head) => make("option", { value: head.head }, String(head.head))));
  at("order").append(...ORDERS.map(([name, text]) => make("option", { value: name }, text)));
  for (const [name, there] of [["keys", data.has_keys], ["class", data.classes !== null]])
    if (!there) at("scope").querySelector(`[value=${name}]`).remove();
  // ?q=word&in=tops&head=2&order=density opens the page as a search left it.
  const asked = new URLSearchParams(location.search);
  if (asked.get("q")) at("search").value = asked.get("q");
  for (const [id, name] of [["scope", "in"], ["head", "head"], ["order", "order"]])
    if ([...at(id).options].some((option) => option.value === asked.get(name))) at(id).value = asked.get(name);
  const fit = () => { document.documentElement.style.setProperty("--top", `${document.querySelector("header").offsetHeight}px`); drawRows(); };
  let waiting = 0;
  at("controls").addEventListener("submit", (event) => event.preventDefault());
  at("search").addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(update, 120); });
  for (const id of ["scope", "head", "order", "dead"]) at(id).addEventListener("change", update);
  at("list").addEventListener("scroll", drawRows, { passive: true });
  const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10, Home: -Infinity, End: Infinity };
  at("list").addEventListener("keydown", (event) => {
    if (event.key in steps) { event.preventDefault(); move(steps[event.key]); }
    if (event.key === "Enter") at("detail").focus();
  });
  at("search").addEventListener("keydown", (event) => { if (event.key === "ArrowDown" || event.key === "Enter") { event.preventDefault(); update(); at("list").focus(); move(0); } });
  addEventListener("keydown", (event) => { if (event.key === "/" && !/^(INPUT|SELECT)$/.test(document.activeElement.tagName)) { event.preventDefault(); at("search").focus(); } });
  addEventListener("hashchange", () => { const item = fromHash(); if (item >= 0 && item !== chosen) choose(item); });
  addEventListener("resize", fit);
  fit();
  const named = fromHash();
  if (named >= 0 && value(named, "fired") === 0) at("dead").checked = true;
  update();
  if (named >= 0) choose(named); else if (shown.length) choose(shown[0]);
  document.documentElement.dataset.loadMs = (performance.now() - started).toFixed(1);
}

setUp();
