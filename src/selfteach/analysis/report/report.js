"use strict";
// Show the report's pages and theme. browser.js and answer.js follow in the same script.
// Data only ever becomes text: nodes are made here, their content set by textContent.

const byId = (id) => document.getElementById(id);

/** Make a node with attributes (and listeners, as onclick: f) and children; strings become text. */
function node(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** Format a number with its sign, as a true minus sign. */
const signed = (value, digits) =>
  (value < 0 ? "−" : value > 0 ? "+" : "") + Math.abs(value).toFixed(digits);
const count = (value) => value.toLocaleString("en");

// -- pages and theme ---------------------------------------------------------------------------

/** Show the page that the address names, or that holds its target. */
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

/** Say below each wide table and figure that there is more to the side, while that is so. */
function watchSideways() {
  const watcher = new ResizeObserver((entries) => entries.forEach(({ target }) => showSideways(target)));
  for (const box of document.querySelectorAll(".scroll, .drawing")) {
    box.after(node("p", { class: "sideways", "aria-hidden": "true", hidden: true }, "There is more: scroll sideways →"));
    box.addEventListener("scroll", () => showSideways(box), { passive: true });
    watcher.observe(box);
  }
}

function showSideways(box) {
  const isWide = box.scrollWidth > box.clientWidth + 1;
  const sign = box.nextElementSibling;
  sign.hidden = !isWide;
  if (isWide) box.tabIndex = 0; // reached by keyboard
  const atEnd = box.scrollLeft + box.clientWidth >= box.scrollWidth - 2;
  sign.textContent = atEnd ? "← There is more: scroll sideways" : "There is more: scroll sideways →";
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

// -- start, once all three files are read ------------------------------------------------------

addEventListener("DOMContentLoaded", () => {
  byId("theme").hidden = false;
  byId("theme").addEventListener("click", () => {
    const theme = document.documentElement.dataset.theme;
    setTheme(THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length]);
  });
  setTheme(savedTheme());
  watchSideways();
  if (byId("index")) listen();
  addEventListener("hashchange", turnPage);
  turnPage();
});
