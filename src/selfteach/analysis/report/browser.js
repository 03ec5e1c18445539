// The browser of answers: what is packed in the page, the filters, and the list.

// -- data --------------------------------------------------------------------------------------

/** JSON from gzip in base64. */
async function unpack(packed) {
  const bytes = Uint8Array.from(atob(packed.trim()), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

const unpacked = new Map(); // block number -> promise of its records

/** The record of an answer; its block is unpacked once. */
async function recordOf(row) {
  const { block, place } = index.columns;
  if (!unpacked.has(block[row])) {
    const packed = document.querySelectorAll("script.block")[block[row]].textContent;
    unpacked.set(block[row], unpack(packed));
  }
  return (await unpacked.get(block[row]))[place[row]];
}

let index = null; // columns over all answers, and the names that they point at
let shown = []; // rows that pass the filters, in order
let chosen = -1; // position in `shown`
let record = null; // the chosen answer
let context = null; // the name of the chosen context
let opening = null;

async function openAnswers(row) {
  if (!("DecompressionStream" in window)) {
    byId("answer").textContent = "This browser is too old to unpack the answers; one of 2024 will do.";
    return;
  }
  opening ||= unpack(byId("index").textContent).then((found) => {
    index = found;
    fillFilters();
    filter();
  });
  await opening;
  const position = shown.indexOf(row);
  if (position >= 0 && position !== chosen) choose(position);
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

/** Whether an answer passes. `wanted` holds the filters' values, empty for all. */
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
  const before = shown[chosen];
  const total = index.columns.problem.length;
  shown = Array.from({ length: total }, (_, row) => row).filter((row) => passes(row, wanted));
  byId("count").textContent = `${count(shown.length)} of ${count(total)} answers`;
  const kept = shown.indexOf(before);
  chosen = -1;
  if (shown.length) choose(Math.max(kept, 0), { show: kept < 0 });
  else nothingChosen();
  drawList();
}

function nothingChosen() {
  record = null;
  byId("list").removeAttribute("aria-activedescendant");
  byId("answer").replaceChildren(node("p", { class: "quiet" }, "No answer passes these filters."));
}

// -- the list: only the rows in view exist -----------------------------------------------------

const ROW = 58; // height of a row in pixels, as in the style sheet
const SPARE = 6; // rows drawn above and below the view

function drawList() {
  const list = byId("list"), rows = byId("rows");
  rows.style.height = `${shown.length * ROW}px`;
  const first = Math.max(0, Math.floor(list.scrollTop / ROW) - SPARE);
  const last = Math.min(shown.length, Math.ceil((list.scrollTop + list.clientHeight) / ROW) + SPARE);
  const made = [];
  for (let position = first; position < last; position++) made.push(listRow(position));
  rows.replaceChildren(...made);
  if (chosen >= first && chosen < last) list.setAttribute("aria-activedescendant", `row-${chosen}`);
}

function listRow(position) {
  const row = shown[position], c = index.columns;
  const step = c.step[row] === null ? "" : ` · step ${c.step[row]}`;
  const facts = [index.sources[c.source[row]] + step];
  if (c.case[row]) facts.push(`case ${c.case[row]}`);
  if (c.length[row] !== null) facts.push(`${c.length[row]} tokens`);
  if (!c.finished[row]) facts.push("cut");
  if (c.dropped[row] >= 0) facts.push(`dropped: ${index.reasons[c.dropped[row]]}`);
  const made = node(
    "div",
    {
      id: `row-${position}`, role: "option", class: "row", "aria-selected": String(position === chosen),
      "aria-setsize": shown.length, "aria-posinset": position + 1,
      onclick: () => choose(position),
    },
    node("span", { class: c.correct[row] ? "mark yes" : "mark no" }, c.correct[row] ? "✓ right" : "✗ wrong"),
    node("span", { class: "name" }, `${index.problems[c.problem[row]]} · ${c.sample[row] + 1}`),
    node("small", {}, facts.join(" · ")),
  );
  made.style.top = `${position * ROW}px`;
  return made;
}

/** Choose an answer by its position in the list, bring it into view, and show it. */
function choose(position, { show = true } = {}) {
  chosen = Math.min(Math.max(position, 0), shown.length - 1);
  const list = byId("list"), top = chosen * ROW;
  if (top < list.scrollTop) list.scrollTop = top;
  else if (top + ROW > list.scrollTop + list.clientHeight)
    list.scrollTop = top + ROW - list.clientHeight;
  drawList();
  if (show) showAnswer(shown[chosen]);
}

const LIST_KEYS = {
  ArrowDown: () => chosen + 1, ArrowUp: () => chosen - 1, Home: () => 0, End: () => shown.length - 1,
  PageDown: () => chosen + Math.floor(byId("list").clientHeight / ROW),
  PageUp: () => chosen - Math.floor(byId("list").clientHeight / ROW),
};

function listen() {
  byId("filters").addEventListener("input", filter);
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
  byId("list").addEventListener("scroll", drawList);
  byId("list").addEventListener("keydown", (event) => {
    if (!LIST_KEYS[event.key]) return;
    event.preventDefault();
    choose(LIST_KEYS[event.key]());
  });
  addEventListener("resize", () => index && drawList());
  addEventListener("scroll", hideTip, { passive: true });
}
