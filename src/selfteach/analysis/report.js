"use strict";
// The report's pages, its theme, and the browser of answers.
// What comes from data only ever becomes text: nodes are made here, their content set by textContent.

const byId = (id) => document.getElementById(id);

/** A node with attributes (and listeners, as onclick: f) and children; strings become text. */
function node(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

/** With a true minus sign and a sign in front. */
const signed = (value, digits) =>
  (value < 0 ? "−" : value > 0 ? "+" : "") + Math.abs(value).toFixed(digits);
const count = (value) => value.toLocaleString("en");

// -- pages and theme ---------------------------------------------------------------------------

/** Show the page that the address names, or that holds what it names. */
function turnPage() {
  const [name, detail] = location.hash.slice(1).split("/");
  const target = (name && byId(name)) || byId("overview");
  const page = target.closest(".page") || byId("overview");
  for (const other of document.querySelectorAll(".page")) other.hidden = other !== page;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === "#" + page.id) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  if (target === page) scrollTo(0, 0);
  else target.scrollIntoView();
  if (page.id === "answers") openAnswers(detail === undefined ? 0 : Number(detail));
}

const THEMES = ["system", "light", "dark"];

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  byId("theme").textContent = `Theme: ${theme}`;
  try {
    localStorage.setItem("selfteach-theme", theme);
  } catch {} // a page opened from a file may have no storage
}

function savedTheme() {
  try {
    return THEMES.find((theme) => theme === localStorage.getItem("selfteach-theme")) || "system";
  } catch {
    return "system";
  }
}

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

// -- one answer --------------------------------------------------------------------------------

async function showAnswer(row) {
  const found = await recordOf(row);
  if (shown[chosen] !== row) return; // another was chosen meanwhile
  record = found;
  const names = Object.keys(record.contexts);
  const scored = names.filter((name) => record.contexts[name].advantage);
  if (!names.includes(context)) context = scored[0] ?? names[0] ?? null;
  history.replaceState(null, "", `#answers/${row}`);
  hideTip();
  byId("answer").replaceChildren(heading(), facts(), node("h4", {}, "Question"),
    node("pre", { class: "question" }, record.question), contextChoice(names), tools(),
    node("div", { id: "strip" }), stepTable(), node("div", { id: "read" }));
  paint();
}

function heading() {
  const verdict = record.correct ? "✓ right" : "✗ wrong";
  return node("h3", { id: "answer-title" },
    node("span", { class: record.correct ? "yes" : "no" }, verdict),
    ` · problem ${record.problem}, answer ${record.sample + 1}`);
}

function facts() {
  const list = node("dl", { class: "facts" });
  const fact = (name, value) =>
    value === null || value === undefined || list.append(node("dt", {}, name), node("dd", {}, value));
  fact("expected", record.gold);
  fact("answered", record.parsed ?? "nothing that can be read");
  fact("from", record.step === null ? record.source : `${record.source}, training step ${record.step}`);
  const { critique } = record;
  if (critique && critique.reason) fact("critique", `none: ${critique.reason}${critique.detail ? ` – ${critique.detail}` : ""}`);
  else fact("case", critique && CASES[critique.case]);
  fact("fidelity", record.fidelity === null ? null : `${(100 * record.fidelity).toFixed(0)} % repeated before the first change`);
  if (!record.finished) fact("ended", "no: cut at the token limit");
  return list;
}

function contextChoice(names) {
  if (!names.length) return node("p", { class: "quiet" }, "No teacher read anything: this answer was learned from its verdict.");
  const choices = names.map((name) => {
    const { dropped } = record.contexts[name];
    const radio = node("input", {
      type: "radio", name: "context", value: name, checked: name === context,
      onchange: () => { context = name; paint(); },
    });
    return node("label", {}, radio, ` ${name}`, dropped ? node("small", {}, ` dropped: ${dropped}`) : null);
  });
  return node("fieldset", { class: "contexts" }, node("legend", {}, "What the teacher read"), ...choices);
}

function tools() {
  const error = record.first_error;
  const numbers = node("input", {
    type: "checkbox", id: "numbers", checked: showNumbers,
    onchange: (event) => { showNumbers = event.target.checked; paint(); },
  });
  return node("div", { class: "tools" },
    node("button", { type: "button", id: "to-error", disabled: error === null, onclick: toFirstError },
      error === null ? "No wrong step" : `First error: step ${error + 1}`),
    node("button", { type: "button", onclick: () => choose(chosen - 1) }, "← Previous answer"),
    node("button", { type: "button", onclick: () => choose(chosen + 1) }, "Next answer →"),
    record.tokens ? node("label", {}, numbers, " numbers") : null);
}

let showNumbers = false;

/** Go to the first wrong step: its first token if there are tokens, else its row. */
function toFirstError() {
  const row = document.querySelector("#steps tr.error");
  const token = row.querySelector(".token");
  row.scrollIntoView({ block: "center" });
  if (token) focusToken(token);
  else row.focus();
}

/** Rows of answer and critique, side by side: steps by number, the final answers last. */
function stepTable() {
  const { spans, critique, tokens } = record;
  const said = critique && critique.steps ? critique.steps : [];
  const final = record.parsed !== null && spans.length > 0 ? spans.length - 1 : null;
  const own = final === null ? spans.length : final;
  const body = node("tbody");
  if (tokens && tokens.step.includes(-1)) body.append(stepRow("–", answerCell(-1), critiqueCell(null)));
  for (let i = 0; i < Math.max(own, said.length); i++) {
    const mine = i < own ? answerCell(i) : node("td", {}, node("span", { class: "quiet" }, "not written"));
    body.append(stepRow(String(i + 1), mine, critiqueCell(said[i]), i === record.first_error));
  }
  if (final !== null || (critique && critique.answer)) {
    const told = critique && critique.answer ? { text: critique.answer, status: null } : null;
    const mine = final === null ? node("td") : answerCell(final);
    body.append(stepRow("answer", mine, critiqueCell(told), final !== null && final === record.first_error));
  }
  const head = ["step", "answer", ...(critique && critique.steps ? ["critique"] : [])];
  return node("table", { id: "steps", onkeydown: moveInTokens, onmouseover: pointed, onmouseout: hideTip,
    onfocusin: pointed, onfocusout: hideTip },
    node("thead", {}, node("tr", {}, ...head.map((title) => node("th", { scope: "col" }, title)))), body);
}

function stepRow(name, mine, told, isError = false) {
  const label = node("th", { scope: "row" }, name, isError ? node("strong", { class: "flag" }, "first error") : null);
  return node("tr", { class: isError ? "error" : null, tabindex: isError ? -1 : null }, label, mine, told);
}

function answerCell(step) {
  const { tokens, text, spans } = record;
  if (!tokens) return node("td", { class: "text" }, text.slice(...spans[step]));
  const cell = node("td", { class: "tokens" });
  const gaps = gapsBefore(tokens.text, text);
  tokens.text.forEach((token, i) => {
    if (tokens.step[i] !== step) return;
    const visible = token.replaceAll("\n", "↵\n").replaceAll("\t", "⇥");
    if (cell.childNodes.length) cell.append(gaps[i]);
    cell.append(node("span", { class: "token", tabindex: i === 0 ? 0 : -1, "data-i": i }, visible));
  });
  return cell;
}

/** White space that stands before each token in the text: some tokenizers leave it to the decoder. */
function gapsBefore(tokens, text) {
  let end = 0;
  return tokens.map((token) => {
    const at = token ? text.indexOf(token, end) : -1;
    if (at < 0 || text.slice(end, at).trim()) return "";
    const gap = text.slice(end, at);
    end = at + token.length;
    return gap;
  });
}

function critiqueCell(step) {
  if (!record.critique || !record.critique.steps) return null;
  if (!step) return node("td");
  const words = { kept: "kept", fixed: "corrected", new: "written anew" };
  return node("td", { class: `text ${step.status ?? ""}` },
    step.status ? node("small", { class: "status" }, words[step.status] ?? step.status) : null, step.text);
}

/** Colours, numbers, strip and text of the chosen context, without moving the focus. */
function paint() {
  const shownContext = context === null ? null : record.contexts[context];
  const advantage = shownContext && shownContext.advantage;
  byId("steps").classList.toggle("numbers", showNumbers);
  for (const token of document.querySelectorAll("#steps .token")) {
    const value = advantage ? advantage[token.dataset.i] * index.unit : 0;
    token.classList.toggle("down", value < 0);
    token.classList.toggle("up", value > 0);
    const strength = Math.min(Math.abs(value) / index.full_colour, 1) * index.strongest;
    token.style.setProperty("--a", strength.toFixed(3));
    token.dataset.a = advantage ? signed(value, 1) : "";
  }
  byId("strip").replaceChildren(...(advantage ? [strip(advantage)] : []));
  const read = shownContext && shownContext.text;
  byId("read").replaceChildren(...(read === null || read === undefined ? [] : [
    node("details", {}, node("summary", {}, `What the teacher read under ${context}`), node("pre", {}, read))]));
}

/** All advantages of the answer as bars, the first error as a dashed line. */
function strip(advantage) {
  const values = advantage.map((value) => value * index.unit);
  const low = Math.min(0, ...values), high = Math.max(0, ...values), span = high - low || 1;
  const make = (tag, attributes) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    return made;
  };
  const y = (value) => (100 * (high - value)) / span;
  const at = record.tokens.step.indexOf(record.first_error);
  const label = `Advantage of ${values.length} tokens, from ${signed(low, 1)} to ${signed(high, 1)} nats` +
    (at >= 0 && record.first_error !== null ? `; the first error begins at token ${at}` : "");
  const drawn = make("svg", { viewBox: `0 0 ${values.length} 100`, preserveAspectRatio: "none", role: "img", "aria-label": label });
  values.forEach((value, i) => drawn.append(make("rect", {
    x: i + 0.1, width: 0.8, y: y(Math.max(value, 0)), height: Math.max(Math.abs(y(value) - y(0)), 0.4),
    class: value < 0 ? "down" : "up",
  })));
  if (at >= 0 && record.first_error !== null)
    drawn.append(make("line", { x1: at, x2: at, y1: 0, y2: 100, class: "error" }));
  const scale = node("div", { class: "scale", "aria-hidden": "true" },
    node("span", {}, `${signed(high, 1)} nats`), node("span", {}, signed(low, 1)));
  return node("div", { class: "strip" }, drawn, scale);
}

// -- tokens: exact values by pointer and by keyboard -------------------------------------------

function pointed(event) {
  const token = event.target.closest(".token");
  if (token) showTip(token);
}

function showTip(token) {
  const i = Number(token.dataset.i), { tokens } = record;
  const step = tokens.step[i] < 0 ? "outside the steps" : `step ${tokens.step[i] + 1}`;
  const kind = tokens.kind ? `, ${index.kinds[tokens.kind[i]]}` : "";
  const lines = [node("div", { class: "quiet" }, `token ${i} “${tokens.text[i]}”, ${step}${kind}`)];
  for (const [name, { advantage }] of Object.entries(record.contexts)) {
    if (!advantage) continue;
    const value = `${signed(advantage[i] * index.unit, 4)} nats`;
    lines.push(node(name === context ? "strong" : "div", { class: "value" }, `${name}: ${value}`));
  }
  const advantage = context === null ? null : record.contexts[context].advantage;
  if (tokens.logp && advantage) {
    const student = tokens.logp[i] * index.unit, teacher = student + advantage[i] * index.unit;
    lines.push(node("div", { class: "quiet" },
      `log p: student ${signed(student, 4)}, teacher ${signed(teacher, 4)}`));
  }
  const tip = byId("tip");
  tip.replaceChildren(...lines);
  tip.hidden = false;
  token.setAttribute("aria-describedby", "tip");
  const box = token.getBoundingClientRect();
  const above = box.bottom + tip.offsetHeight + 12 > innerHeight;
  tip.style.top = `${above ? box.top - tip.offsetHeight - 6 : box.bottom + 6}px`;
  tip.style.left = `${Math.max(6, Math.min(box.left, innerWidth - tip.offsetWidth - 6))}px`;
}

function hideTip() {
  byId("tip").hidden = true;
}

function focusToken(token) {
  for (const other of document.querySelectorAll("#steps .token[tabindex='0']")) other.tabIndex = -1;
  token.tabIndex = 0;
  token.focus();
}

function moveInTokens(event) {
  const token = event.target.closest(".token");
  if (!token) return;
  if (event.key === "Escape") hideTip();
  const all = [...document.querySelectorAll("#steps .token")].sort((a, b) => a.dataset.i - b.dataset.i);
  const at = all.indexOf(token);
  const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: all.length - 1 }[event.key];
  if (to === undefined || !all[to]) return;
  event.preventDefault();
  focusToken(all[to]);
}

// -- begin -------------------------------------------------------------------------------------

byId("theme").hidden = false;
byId("theme").addEventListener("click", () => {
  const now = document.documentElement.dataset.theme;
  setTheme(THEMES[(THEMES.indexOf(now) + 1) % THEMES.length]);
});
setTheme(savedTheme());
if (byId("index")) {
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
addEventListener("hashchange", turnPage);
turnPage();
