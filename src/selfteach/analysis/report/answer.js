// Show one answer: its steps beside its critique, its tokens coloured under the selected context.

// -- one answer --------------------------------------------------------------------------------

async function showAnswer(row) {
  const loaded = await recordOf(row);
  if (shown[selected] !== row) return; // another was selected meanwhile
  record = loaded;
  const names = Object.keys(record.contexts);
  const scored = names.filter((name) => record.contexts[name].advantage);
  if (!names.includes(context)) context = scored[0] ?? names[0] ?? null;
  history.replaceState(null, "", `#answers/${row}`);
  hideTip();
  byId("answer").replaceChildren(heading(), facts(), node("h3", {}, "Question"),
    node("pre", { class: "question", tabindex: 0 }, record.question), ...promptOf(record), contextChoice(names), tools(),
    node("div", { id: "strip" }), stepTable(), node("div", { id: "read" }));
  paint();
}

function heading() {
  const verdict = record.correct ? "✓ right" : "✗ wrong";
  return node("h2", { id: "answer-title" },
    node("span", { class: record.correct ? "yes" : "no" }, verdict),
    ` · problem ${record.problem}, answer ${record.sample + 1}`);
}

function facts() {
  const list = node("dl", { class: "facts" });
  const fact = (name, value) =>
    value === null || value === undefined || list.append(node("dt", {}, name), node("dd", {}, value));
  fact("gold answer", record.gold);
  fact("parsed answer", record.parsed ?? "none");
  fact("source", record.step === null ? record.source : `${record.source}, training step ${record.step}`);
  const { critique } = record;
  if (critique && critique.reason) fact("critique", `none: ${critique.reason}${critique.detail ? ` – ${critique.detail}` : ""}`);
  else fact("case", critique && CASES[critique.case]);
  fact("fidelity", record.fidelity === null ? null : `${(100 * record.fidelity).toFixed(0)} % repeated before the first change`);
  if (!record.finished) fact("truncated", "at the token limit");
  return list;
}

const SHORT_PROMPT = 700; // characters; longer prompts are folded until someone opens one
let promptsOpen = null; // the reader's choice for all answers, once made

/** Return the prompt as the student saw it; where it is not stored, the messages before the question. */
function promptOf({ prompt, history }) {
  if (prompt === null) {
    const turns = history.map(({ role, content }) => node("pre", {}, `${role}: ${content}`));
    return [...(turns.length ? [node("h3", {}, "Messages before the question"), ...turns] : []),
      node("p", { class: "quiet" }, "The student's whole prompt is not stored in this folder.")];
  }
  const text = node("pre", { class: "prompt", tabindex: 0 }, prompt);
  const summary = node("summary", {}, `Prompt as the student saw it (${count(prompt.length)} characters)`);
  summary.addEventListener("click", () => { promptsOpen = !summary.parentNode.open; });
  return [node("details", { class: "prompt-of-student", open: promptsOpen ?? prompt.length <= SHORT_PROMPT }, summary, text)];
}

function contextChoice(names) {
  if (!names.length) return node("p", { class: "quiet" }, "No teacher context: this answer was trained on with its verdict alone.");
  const choices = names.map((name) => {
    const { dropped } = record.contexts[name];
    const radio = node("input", {
      type: "radio", name: "context", value: name, checked: name === context,
      onchange: () => { context = name; paint(); },
    });
    return node("label", {}, radio, ` ${name}`, dropped ? node("small", {}, ` dropped: ${dropped}`) : null);
  });
  return node("fieldset", { class: "contexts" }, node("legend", {}, "Teacher context"), ...choices);
}

function tools() {
  const error = record.first_error;
  const numbers = node("input", {
    type: "checkbox", id: "numbers", checked: showNumbers,
    onchange: (event) => { showNumbers = event.target.checked; paint(); },
  });
  return node("div", { class: "tools" },
    node("button", { type: "button", id: "to-error", disabled: error === null, onclick: toFirstError },
      error === null ? `No wrong ${unit()}` : `First error: ${unit()} ${error + 1}`),
    node("button", { type: "button", onclick: () => select(selected - 1) }, "← Previous answer"),
    node("button", { type: "button", onclick: () => select(selected + 1) }, "Next answer →"),
    record.tokens ? node("label", {}, numbers, " numbers") : null);
}

let showNumbers = false;

/** What a row of the table is: a turn of an episode, or a step of a single answer. */
const unit = () => (record.replies.length ? "turn" : "step");

/** Go to the first wrong step: its first token if there are tokens, else its row. */
function toFirstError() {
  const row = document.querySelector("#steps tr.error");
  const token = row.querySelector(".token");
  row.scrollIntoView({ block: "center" });
  if (token) focusToken(token);
  else row.focus();
}

/** Make the rows of answer and critique, side by side: steps by number, the final answers last. */
function stepTable() {
  const { spans, critique, tokens } = record;
  const critiqueSteps = critique && critique.steps ? critique.steps : [];
  const final = record.parsed !== null && spans.length > 0 ? spans.length - 1 : null;
  const numSteps = final === null ? spans.length : final;
  const body = node("tbody");
  if (tokens && tokens.step.includes(-1)) body.append(stepRow("–", answerCell(-1), critiqueCell(null)));
  for (let i = 0; i < Math.max(numSteps, critiqueSteps.length); i++) {
    const cell = i < numSteps ? answerCell(i) : node("td", {}, node("span", { class: "quiet" }, "not written"));
    body.append(stepRow(String(i + 1), cell, critiqueCell(critiqueSteps[i]), i === record.first_error));
    body.append(...replyRows(i));
  }
  const last = critiqueSteps.at(-1);
  const isLastTurn = final === null && last && critique.answer === last.text; // no answer beside the turns
  if (final !== null || (critique && critique.answer && !isLastTurn)) {
    const corrected = critique && critique.answer ? { text: critique.answer, status: null } : null;
    const cell = final === null ? node("td") : answerCell(final);
    body.append(stepRow("answer", cell, critiqueCell(corrected), final !== null && final === record.first_error));
    if (final !== null) body.append(...replyRows(final));
  }
  const head = [unit(), "answer", ...(critique && critique.steps ? ["critique"] : [])];
  return node("table", { id: "steps", onkeydown: moveInTokens, onmouseover: showTipAt, onmouseout: hideTip,
    onfocusin: showTipAt, onfocusout: hideTip },
    node("thead", {}, node("tr", {}, ...head.map((title) => node("th", { scope: "col" }, title)))), body);
}

/** Make the rows of what an environment replied to a turn: no tokens of the model, so no colours. */
function replyRows(turn) {
  return record.replies.filter(([before]) => before === turn).map(([, text]) =>
    node("tr", { class: "reply" }, node("th", { scope: "row" }, "reply"), node("td", { class: "text quiet", colspan: 2 }, text)));
}

function stepRow(name, answerCell, critiqueCell, isError = false) {
  const label = node("th", { scope: "row" }, name, isError ? node("strong", { class: "flag" }, "first error") : null);
  return node("tr", { class: isError ? "error" : null, tabindex: isError ? -1 : null }, label, answerCell, critiqueCell);
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

/** Return the white space before each token in the text: some tokenizers leave it to the decoder. */
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
  const words = { kept: "repeated", fixed: "corrected", new: "new" };
  const lines = step.text.includes("\n") ? "status above" : "status";
  return node("td", { class: `text ${step.status ?? ""}` },
    step.status ? node("small", { class: lines }, words[step.status] ?? step.status) : null, step.text);
}

/** Update colours, numbers, strip and text to the selected context, without moving the focus. */
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
  const text = shownContext && shownContext.text;
  byId("read").replaceChildren(...(text === null || text === undefined ? [] : [
    node("details", {}, node("summary", {}, `Teacher context: ${context}`), node("pre", {}, text))]));
}

/** Draw all advantages of the answer as bars, the first error as a dashed line. */
function strip(advantage) {
  const values = advantage.map((value) => value * index.unit);
  const low = Math.min(0, ...values), high = Math.max(0, ...values), span = high - low || 1;
  const make = (tag, attributes) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    return element;
  };
  const y = (value) => (100 * (high - value)) / span;
  const at = record.tokens.step.indexOf(record.first_error);
  const label = `Advantage of ${values.length} tokens, from ${signed(low, 1)} to ${signed(high, 1)} nats` +
    (at >= 0 && record.first_error !== null ? `; the first error begins at token ${at}` : "");
  const chart = make("svg", { viewBox: `0 0 ${values.length} 100`, preserveAspectRatio: "none", role: "img", "aria-label": label });
  values.forEach((value, i) => chart.append(make("rect", {
    x: i + 0.1, width: 0.8, y: y(Math.max(value, 0)), height: Math.max(Math.abs(y(value) - y(0)), 0.4),
    class: value < 0 ? "down" : "up",
  })));
  if (at >= 0 && record.first_error !== null)
    chart.append(make("line", { x1: at, x2: at, y1: 0, y2: 100, class: "error" }));
  const scale = node("div", { class: "scale", "aria-hidden": "true" },
    node("span", {}, `${signed(high, 1)} nats`), node("span", {}, signed(low, 1)));
  return node("div", { class: "strip" }, chart, scale);
}

// -- tokens: exact values by pointer and by keyboard -------------------------------------------

function showTipAt(event) {
  const token = event.target.closest(".token");
  if (token) showTip(token);
}

let tipToken = null; // the token whose values are shown

function showTip(token) {
  tipToken = token;
  const i = Number(token.dataset.i), { tokens } = record;
  const step = tokens.step[i] < 0 ? `outside the ${unit()}s` : `${unit()} ${tokens.step[i] + 1}`;
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

/** Keep the tip at a token with the keyboard's focus or the pointer, when it has scrolled; else hide it. */
function moveTip() {
  if (byId("tip").hidden) return;
  if (tipToken === document.activeElement || tipToken.matches(":hover")) showTip(tipToken);
  else hideTip();
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
