// Browse answers: the compressed data in the page, the filters, and the list.

// -- data --------------------------------------------------------------------------------------

/** Return JSON from gzip in base64. */
async function decompress(text) {
  const bytes = Uint8Array.from(atob(text.trim()), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

const loadedBlocks = new Map(); // block number -> promise of its records

/** Return the record of an answer; its block is decompressed once. */
async function recordOf(row) {
  const { block, place } = index.columns;
  if (!loadedBlocks.has(block[row])) {
    const text = document.querySelectorAll("script.block")[block[row]].textContent;
    loadedBlocks.set(block[row], decompress(text));
  }
  return (await loadedBlocks.get(block[row]))[place[row]];
}

let index = null; // columns over all answers, and the names that they index
let shown = []; // rows that pass the filters, in order
let selected = -1; // position in `shown`
let record = null; // the selected answer
let context = null; // the name of the selected context
let loading = null; // promise of the index

async function openAnswers(row) {
  if (!("DecompressionStream" in window)) {
    byId("answer").textContent = "This browser is too old to show the answers; one of 2024 or newer is needed.";
    return;
  }
  loading ||= decompress(byId("index").textContent).then((loaded) => {
    index = loaded;
    fillFilters();
    filter();
  });
  await loading;
  const position = shown.indexOf(row);
  if (position >= 0 && position !== selected) select(position);
  drawList();
}

// -- filters -----------------------------------------------------------------------------------

const CASES = { A: "A all right", B: "B step missing", C: "C cut off", D: "D wrong" };

function fillFilters() {
  const option = (value, text) => node("option", { value }, text);
  const cases = [...new Set(index.columns.case)].sort();
  byId("f-case").append(...cases.map((c) => option(c ?? "none", c ? CASES[c] : "no critique")));
  byId("f-dropped").append(...index.reasons.map((r, i) => option(`reason ${i}`, `dropped: ${r}`)));
  byId("f-source").append(...index.sources.map((name, i) => option(String(i), name)));
}

/** Return whether an answer passes. `wanted` holds the filters' values, empty for all. */
function passes(row, wanted) {
  const { correct, dropped, source, problem } = index.columns;
  const verdict = correct[row] ? "right" : "wrong";
  if (wanted.verdict && wanted.verdict !== verdict) return false;
  if (wanted.case && wanted.case !== (index.columns.case[row] ?? "none")) return false;
  if (wanted.dropped === "usable" && dropped[row] >= 0) return false;
  if (wanted.dropped === "dropped" && dropped[row] < 0) return false;
  if (wanted.dropped.startsWith("reason ") && wanted.dropped !== `reason ${dropped[row]}`)
    return false;
  if (wanted.source && wanted.source !== String(source[row])) return false;
  if (!wanted.problem) return true;
  const name = index.problems[problem[row]], excerpt = index.excerpts[problem[row]];
  return `${name} ${excerpt}`.toLowerCase().includes(wanted.problem);
}

function filter() {
  const wanted = {
    verdict: byId("f-verdict").value, case: byId("f-case").value, dropped: byId("f-dropped").value,
    source: byId("f-source").value, problem: byId("f-problem").value.trim().toLowerCase(),
  };
  const before = shown[selected];
  const total = index.columns.problem.length;
  shown = Array.from({ length: total }, (_, row) => row).filter((row) => passes(row, wanted));
  byId("count").textContent = `${count(shown.length)} of ${count(total)} answers`;
  const position = shown.indexOf(before);
  selected = -1;
  if (shown.length) select(Math.max(position, 0), { show: position < 0 });
  else showNoMatch();
  drawList();
}

function showNoMatch() {
  record = null;
  byId("list").removeAttribute("aria-activedescendant");
  byId("answer").replaceChildren(node("p", { class: "quiet" }, "No answer passes these filters."));
}

// -- the list: only the rows in view are nodes -----------------------------------------------------

const ROW = 58; // height of a row in pixels, as in the style sheet
const SPARE = 6; // rows drawn above and below the view

function drawList() {
  const list = byId("list"), rows = byId("rows");
  rows.style.height = `${shown.length * ROW}px`;
  const first = Math.max(0, Math.floor(list.scrollTop / ROW) - SPARE);
  const last = Math.min(shown.length, Math.ceil((list.scrollTop + list.clientHeight) / ROW) + SPARE);
  const nodes = [];
  for (let position = first; position < last; position++) nodes.push(listRow(position));
  rows.replaceChildren(...nodes);
  if (selected >= first && selected < last) list.setAttribute("aria-activedescendant", `row-${selected}`);
}

function listRow(position) {
  const row = shown[position], c = index.columns;
  const step = c.step[row] === null ? "" : ` · step ${c.step[row]}`;
  const facts = [index.sources[c.source[row]] + step];
  if (c.case[row]) facts.push(`case ${c.case[row]}`);
  if (c.length[row] !== null) facts.push(`${c.length[row]} tokens`);
  if (!c.finished[row]) facts.push("truncated");
  if (c.dropped[row] >= 0) facts.push(`dropped: ${index.reasons[c.dropped[row]]}`);
  const element = node(
    "div",
    {
      id: `row-${position}`, role: "option", class: "row", "aria-selected": String(position === selected),
      "aria-setsize": shown.length, "aria-posinset": position + 1,
      onclick: () => select(position),
    },
    node("span", { class: c.correct[row] ? "mark yes" : "mark no" }, c.correct[row] ? "✓ right" : "✗ wrong"),
    node("span", { class: "name" }, `${index.problems[c.problem[row]]} · ${c.sample[row] + 1}`),
    node("small", {}, facts.join(" · ")),
  );
  element.style.top = `${position * ROW}px`;
  return element;
}

/** Select an answer by its position in the list, bring it into view, and show it. */
function select(position, { show = true } = {}) {
  selected = Math.min(Math.max(position, 0), shown.length - 1);
  const list = byId("list"), top = selected * ROW;
  if (top < list.scrollTop) list.scrollTop = top;
  else if (top + ROW > list.scrollTop + list.clientHeight)
    list.scrollTop = top + ROW - list.clientHeight;
  drawList();
  if (show) showAnswer(shown[selected]);
}

const LIST_KEYS = {
  ArrowDown: () => selected + 1, ArrowUp: () => selected - 1, Home: () => 0, End: () => shown.length - 1,
  PageDown: () => selected + Math.floor(byId("list").clientHeight / ROW),
  PageUp: () => selected - Math.floor(byId("list").clientHeight / ROW),
};

function listen() {
  byId("filters").addEventListener("input", filter);
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
  byId("list").addEventListener("scroll", drawList);
  byId("list").addEventListener("keydown", (event) => {
    if (!LIST_KEYS[event.key]) return;
    event.preventDefault();
    select(LIST_KEYS[event.key]());
  });
  addEventListener("resize", () => index && drawList());
  addEventListener("scroll", moveTip, { passive: true });
}
