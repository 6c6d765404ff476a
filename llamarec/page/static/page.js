"use strict";
const byId = (id) => document.getElementById(id);
const state = { history: [], user: null, next: null, asked: 0, store: false, own: false };

function element(tag, text, attributes = {}) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

async function get(path, options) {
  const response = await fetch(path, options);
  const body = await response.json();
  if (!response.ok) throw new Error(body.error ?? body.detail ?? response.statusText);
  return body;
}

function say(text) {
  byId("message").textContent = text;
  byId("message").hidden = !text;
}

// ---- suggestions under an input, chosen with arrow keys and Enter or a tap; Escape closes them

function combo(input, list, find, row, choose) {
  let found = [], chosen = -1, timer, latest = 0;
  const close = () => { list.hidden = true; input.setAttribute("aria-expanded", "false"); chosen = -1; };
  const mark = () => {
    [...list.children].forEach((option, place) => option.setAttribute("aria-selected", place === chosen));
    list.children[chosen]?.scrollIntoView({ block: "nearest" });
    if (chosen < 0) input.removeAttribute("aria-activedescendant");
    else input.setAttribute("aria-activedescendant", `${list.id}-${chosen}`);
  };
  // Suggestions for earlier words must never be chosen: Enter may be pressed before the new ones arrive.
  const forget = () => { latest++; found = []; list.replaceChildren(); close(); };
  const take = (place) => { const item = found[place]; if (item) { forget(); input.value = ""; choose(item); } };
  async function open() {
    const mine = ++latest;
    const answer = await find(input.value.trim()).catch((error) => { say(error.message); return []; });
    if (mine !== latest) return;
    found = answer;
    list.replaceChildren(...found.map((item, place) => {
      const option = element("li", undefined, { role: "option", id: `${list.id}-${place}` });
      option.append(...row(item));
      option.addEventListener("mousedown", (event) => { event.preventDefault(); take(place); });
      return option;
    }));
    list.hidden = !found.length;
    input.setAttribute("aria-expanded", String(!list.hidden));
    chosen = -1;
  }
  input.addEventListener("input", () => { forget(); clearTimeout(timer); timer = setTimeout(open, 120); });
  input.addEventListener("focus", () => { if (input.value || input.id === "user") open(); });
  input.addEventListener("blur", forget);
  input.addEventListener("keydown", (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (step && found.length) { chosen = (chosen + step + found.length) % found.length; mark(); event.preventDefault(); }
    else if (event.key === "Enter") { take(Math.max(chosen, 0)); event.preventDefault(); }
    else if (event.key === "Escape") close();
  });
}

combo(byId("user"), byId("user-list"),
  (words) => get(`/api/users?q=${encodeURIComponent(words)}`),
  (user) => [element("span", `user ${user.id}`), element("small", `${user.items} items`)],
  (user) => takeUser(user.id));

combo(byId("search"), byId("search-list"),
  async (words) => (words ? get(`/api/items?q=${encodeURIComponent(words)}`) : []),
  (item) => [element("span", item.title), element("small", item.id)],
  (item) => choose(item));

byId("dice").addEventListener("click", async () => {
  const users = await get("/api/users").catch((error) => { say(error.message); return []; });
  if (users.length) takeUser(users[0].id);
});
byId("clear").addEventListener("click", () => (state.own ? record([], true) : (leaveUser(), (state.history = []), update())));

function post(path, body) {
  return get(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });
}

// ---- with a store: what is chosen is recorded for this browser, and items can be added and hidden

function visitor() {
  if (!localStorage.visitor) localStorage.visitor = `page-${Math.random().toString(36).slice(2, 12)}`;
  return localStorage.visitor;
}

// Another user's history is copied first, so that the recommendations go on from what the page shows.
function choose(item) {
  if (!state.store) { leaveUser(); state.history.push(item); update(); }
  else if (state.own) record([item.id], false);
  else record([...state.history.map((earlier) => earlier.id), item.id], true);
}

async function record(items, anew) {
  try {
    takeOwn(await post("/api/events", { visitor: visitor(), items, anew }));
  } catch (error) { say(error.message); }
}

function takeOwn(history) {
  leaveUser();
  Object.assign(state, { own: true, history });
  update();
}

async function showOwn() {
  try {
    takeOwn(await get(`/api/visitors/${encodeURIComponent(visitor())}`));
  } catch (error) { say(error.message); }
}
byId("mine").addEventListener("click", showOwn);

byId("new-item").addEventListener("submit", async (event) => {
  event.preventDefault();
  try {
    const item = await post("/api/items", { title: byId("new-title").value });
    byId("new-title").value = "";
    await recommend();
    say(`“${item.title}” was added as ${item.id}. It can be searched, chosen and recommended now.`);
  } catch (error) { say(error.message); }
});

async function hide(item, hidden) {
  try {
    showHidden(await post("/api/hidden", { item, hidden }));
    recommend();
  } catch (error) { say(error.message); }
}

function showHidden(items) {
  byId("hidden-box").hidden = !items.length;
  byId("hidden-items").replaceChildren(...items.map((item) => {
    const row = element("li", item.title || item.id);
    const button = element("button", "Show again", { type: "button", class: "quiet", "aria-label": `show ${item.title || item.id} again` });
    button.addEventListener("click", () => hide(item.id, false));
    row.append(button);
    return row;
  }));
}

async function takeUser(id) {
  try {
    const user = await get(`/api/users/${encodeURIComponent(id)}`);
    Object.assign(state, { user: user.id, history: user.history, next: user.next, own: false });
    update();
  } catch (error) { say(error.message); }
}

// An edited history is no longer that user's, so the user's next item no longer applies.
function leaveUser() { Object.assign(state, { user: null, next: null, own: false }); }

function update() {
  const shown = state.own ? "own" : state.user !== null ? `user=${encodeURIComponent(state.user)}` : state.history.length
    ? state.history.map((item) => `item=${encodeURIComponent(item.id)}`).join("&") : "";
  window.history.replaceState(null, "", shown ? `?${shown}` : location.pathname);
  showHistory();
  recommend();
}

function showHistory() {
  const total = state.history.length;
  const whose = state.own ? "recorded for you: " : state.user !== null ? `user ${state.user}: ` : "";
  byId("count").textContent = total ? `${whose}${total} item${total === 1 ? "" : "s"}, newest first` : "No items yet";
  byId("clear").hidden = !total;
  byId("clear").textContent = state.own ? "Forget me" : "Clear";
  byId("mine").hidden = !state.store || state.own;
  byId("history").replaceChildren(...state.history.map((item, place) => {
    const row = element("li");
    row.append(element("span", item.title || `${item.id} (unknown)`, item.title ? {} : { class: "unknown" }));
    if (state.own) return row; // what happened has happened
    const remove = element("button", "×", { type: "button", "aria-label": `remove ${item.title || item.id}` });
    remove.addEventListener("click", () => { leaveUser(); state.history.splice(place, 1); update(); });
    row.append(remove);
    return row;
  }).reverse());
  byId("truth").hidden = !state.next;
  byId("truth").textContent = state.next ? `What this user really chose next: ${state.next.title}` : "";
}

async function recommend() {
  const mine = ++state.asked;
  byId("result").setAttribute("aria-busy", "true");
  try {
    const answer = await post("/api/recommend", state.own ? { visitor: visitor() } : { history: state.history.map((item) => item.id) });
    if (mine === state.asked) show(answer);
  } catch (error) {
    if (mine === state.asked) say(error.message);
  } finally {
    if (mine === state.asked) byId("result").setAttribute("aria-busy", "false");
  }
}

function movement(row, place) {
  if (!row.retriever_rank) return ["new", ""];
  const moved = row.retriever_rank - place;
  if (!moved) return ["=", ""];
  return moved > 0 ? [`▲ ${moved}`, "up"] : [`▼ ${-moved}`, "down"];
}

function showList(list, rows, moves) {
  const most = Math.max(...rows.map((row) => row.score), 1e-9);
  list.replaceChildren(...rows.map((row, index) => {
    const line = element("li", undefined, { "data-item": row.id, title: `${row.title} · id ${row.id} · score ${row.score}` });
    line.style.setProperty("--share", row.score / most);
    line.append(element("b", index + 1), name(row), element("i", row.score.toFixed(3)));
    if (moves) {
      const [arrow, kind] = movement(row, index + 1);
      line.append(element("em", arrow, kind ? { class: kind } : {}));
    }
    if (state.next?.id === row.id) line.classList.add("next");
    line.addEventListener("mouseenter", () => light(row.id));
    line.addEventListener("mouseleave", () => light(null));
    return line;
  }));
  if (!rows.length) list.append(element("li", "No items left to recommend", { class: "empty" }));
}

// With a store, the title of a recommended item is a button that records it, beside one that hides it.
function name(row) {
  const title = element("span");
  if (!state.store) { title.textContent = row.title || row.id; return title; }
  const take = element("button", row.title || row.id, { type: "button", class: "take", title: `Record that you chose ${row.title || row.id}` });
  take.addEventListener("click", () => choose(row));
  const away = element("button", "hide", { type: "button", class: "hide", "aria-label": `hide ${row.title || row.id} from all lists` });
  away.addEventListener("click", () => hide(row.id, true));
  title.append(take, away);
  return title;
}

function light(id) {
  byId("links").classList.toggle("dim", id !== null);
  for (const part of document.querySelectorAll("#lists [data-item]")) part.classList.toggle("lit", part.dataset.item === id);
}

// Draw a line from each item's place in the retriever's list to its place in the ranker's.
function drawLinks() {
  const box = byId("lists").getBoundingClientRect();
  const left = new Map([...byId("retrieved").children].map((line) => [line.dataset.item, line]));
  const paths = [];
  for (const line of byId("ranked").children) {
    const start = left.get(line.dataset.item)?.getBoundingClientRect();
    if (!start) continue;
    const end = line.getBoundingClientRect();
    const [x0, y0] = [start.right - box.left + 4, start.top + start.height / 2 - box.top];
    const [x1, y1] = [end.left - box.left - 4, end.top + end.height / 2 - box.top];
    const bend = (x1 - x0) / 2;
    const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
    path.setAttribute("d", `M${x0} ${y0}C${x0 + bend} ${y0} ${x1 - bend} ${y1} ${x1} ${y1}`);
    path.dataset.item = line.dataset.item;
    const kind = line.classList.contains("next") ? "next" : y1 < y0 - 1 ? "up" : y1 > y0 + 1 ? "down" : "";
    if (kind) path.classList.add(kind);
    paths.push(path);
  }
  byId("links").replaceChildren(...paths);
}
window.addEventListener("resize", drawLinks);

const NAMES = { features: "features", retriever: "retriever", prompt_builder: "prompt builder", ranker: "ranker" };

function milliseconds(value) { return value >= 1000 ? `${(value / 1000).toFixed(2)} s` : `${value.toFixed(value < 10 ? 1 : 0)} ms`; }

function showTime(answer) {
  const parts = Object.entries(answer.steps).map(([step, time]) => [NAMES[step] ?? step, time.compute_ms + time.queue_ms]);
  const inside = parts.reduce((sum, [, time]) => sum + time, 0);
  parts.push(["between steps and network", Math.max(answer.milliseconds.all - inside, 0)]);
  byId("time").hidden = false;
  byId("total").textContent = `${milliseconds(answer.milliseconds.all)} in total · retriever alone ${milliseconds(answer.milliseconds["retriever alone"])}`;
  byId("stack").setAttribute("aria-label", parts.map(([name, time]) => `${name} ${milliseconds(time)}`).join(", "));
  byId("stack").replaceChildren(...parts.map(([, time], place) => {
    const part = element("span");
    part.style.cssText = `flex: ${Math.max(time, 0.001)} 0 0; background: var(--s${place})`;
    return part;
  }));
  byId("legend").replaceChildren(...parts.map(([name, time], place) => {
    const line = element("li");
    line.style.setProperty("--of", `var(--s${place})`);
    line.append(element("span", name), element("b", milliseconds(time)));
    return line;
  }));
}

function showPrompt(answer) {
  byId("prompt-box").hidden = !answer.prompt;
  byId("tokens").textContent = `${answer.tokens} tokens; one forward pass gives all scores`;
  const parts = answer.prompt.split(/(\([A-T]\) |###[^\n]*\n)/);
  byId("prompt").replaceChildren(...parts.map((part) =>
    /^\([A-T]\) $/.test(part) ? element("b", part) : part.startsWith("###") ? element("u", part) : new Text(part)));
}

function show(answer) {
  const unknown = answer.unknown.length;
  say(answer.degraded ? "The ranker did not answer; both lists are from the retriever."
    : unknown ? `${unknown} item${unknown === 1 ? " is" : "s are"} unknown to the retriever and skipped.` : "");
  showList(byId("retrieved"), answer.retrieved, false);
  showList(byId("ranked"), answer.ranked, true);
  showTime(answer);
  showPrompt(answer);
  drawLinks();
}

async function start() {
  const facts = await get("/api/facts");
  const number = (value) => value.toLocaleString("en");
  state.store = facts.store;
  byId("new-item").hidden = !facts.store;
  if (facts.store) showHidden(await get("/api/hidden"));
  byId("facts").textContent = `${facts.dataset} · ${number(facts.users)} users · ${number(facts.items)} items · ${number(facts.interactions)} interactions · release ${facts.release}`;
  const given = new URLSearchParams(location.search);
  if (given.has("own") && facts.store) return showOwn();
  if (given.has("user")) return takeUser(given.get("user"));
  if (given.has("item")) state.history = await get(`/api/items${location.search}`);
  update();
}
start().catch((error) => say(error.message));
