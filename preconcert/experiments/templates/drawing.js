const byId = (id) => document.getElementById(id);
function make(tag, className, ...children) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  node.append(...children);
  return node;
}
const mark = (right) => right === null ? "" : right ? " ✓" : " ✗";
const judged = (right) => right === null ? "chip" : right ? "chip right" : "chip wrong";

function isGrid(rows) {
  if (rows.length < 2) return false;
  const cells = rows.map((row) => row.trim().split(/\s+/));
  return cells.every((row) => row.length === cells[0].length && row.length > 1 && row.every((cell) => /^[\w#.]{1,9}$/.test(cell) && !/^[a-z]{2,}/i.test(cell)));
}
function drawGrid(rows) {
  const cells = rows.map((row) => row.trim().split(/\s+/));
  const board = make("div", "board");
  board.style.gridTemplateColumns = `repeat(${cells[0].length}, 1fr)`;
  board.style.aspectRatio = `${cells[0].length} / ${cells.length}`;
  for (const text of cells.flat()) {
    const cell = make("div", "cell" + (text === "#" ? " wall" : /[A-Z]/.test(text) ? " strong" : ""));
    for (const sign of text) {
      if (/\d/.test(sign)) {
        const token = make("span", "token", sign);
        token.style.background = `var(--c${sign % 8})`;
        cell.append(token);
      } else if (sign !== "." && sign !== "#") cell.append(make("span", "", sign));
    }
    board.append(cell);
  }
  return board;
}
function piece(expected, came) {
  const known = came !== null, right = came === expected;
  const chip = make("span", "chip" + (known ? (right ? " right" : " wrong") : ""), expected);
  if (known && !right) chip.append(make("span", "slot", ` came ${came}`));
  return chip;
}
function drawWay(steps) {
  const body = make("tbody", "");
  steps.forEach((each, ahead) => {
    const does = make("td", "", `${ahead + 1}. ${each.does}`, each.says === null ? "" : make("span", "soft", ` “${each.says}”`));
    const others = make("td", "", ...each.others.map((other) => piece(`${other.agent} ${other.expected}`, other.came === null ? null : `${other.agent} ${other.came}`)));
    const seen = make("td", "mono", ...each.view.map((part) => piece(part.expected, part.came)));
    const paid = make("td", "number", String(+each.reward.toFixed(3)), each.paid !== null && each.paid !== each.reward ? make("span", "bad", ` paid ${+each.paid.toFixed(3)}`) : "");
    body.append(make("tr", "way", does, others, seen, paid));
  });
  const head = make("tr", "", ...["does", "the others", "sees: imagined beside real", "reward"].map((name) => make("th", "", name)));
  return make("table", "", make("thead", "", head), body);
}
function drawPlan(weighed) {
  const taken = weighed.find((each) => each.chosen);
  const plan = make("div", "plan");
  if (taken) plan.append(make("span", "soft", `planned: ${weighed.length} ${weighed.length === 1 ? "candidate" : "candidates"}, score ${taken.score.toFixed(3)}; what it foresaw`), drawWay(taken.steps));
  const head = make("tr", "", ...["candidate", "score", "mean", "spread", "disagreement", "visits"].map((name, place) => make("th", place ? "number" : "", name)));
  const rows = weighed.map((each) => make("tr", each.chosen ? "chosen" : "",
    make("td", "", (each.chosen ? "▸ " : "") + each.does, each.says === null ? "" : make("span", "soft", ` “${each.says}”`)),
    ...[each.score, each.mean, each.spread, each.disagreement].map((value) => make("td", "number", value.toFixed(3))),
    make("td", "number", String(each.visits))));
  const details = make("details", "", make("summary", "", "all candidates"), make("table", "", make("thead", "", head), make("tbody", "", ...rows)));
  for (const each of weighed) if (!each.chosen) details.append(make("p", "soft small", `${each.does}${each.says === null ? "" : ` “${each.says}”`} foresaw`), drawWay(each.steps));
  plan.append(details);
  return plan;
}
function drawAgent(view, number) {
  const card = make("section", "card agent");
  card.style.setProperty("--hue", `var(--c${number % 8})`);
  const does = make("span", "does", "does ", make("b", "", view.does));
  if (view.reward) does.append(make("span", "good", `  +${+view.reward.toFixed(3)}`));
  card.append(make("h3", "", make("span", "token", String(number)), view.agent, does));
  const list = make("dl", "");
  const row = (name, ...content) => list.append(make("dt", "", name), make("dd", "", ...content));
  row("saw", make("span", "mono", view.saw));
  row("heard", ...(view.heard.length ? view.heard.map((mail) => make("span", "chip", make("span", "slot", mail.sender + ": "), mail.words)) : [make("span", "soft", "nothing yet")]));
  if (view.alone) row("acts", make("span", "soft", "as the silent team would, having heard nothing"));
  if (view.malformed) row("wrote", make("span", "bad", "a malformed turn; the default action was taken"));
  if (view.intends.length) row("intends", ...view.intends.map((guess) => {
    const said = `${guess.actions.join(", ")}${mark(guess.right)}`;
    const chip = make("span", judged(guess.right) + (guess.known ? "" : " dark"), make("span", "slot", guess.about + " will "), said);
    if (guess.right === false) chip.append(make("span", "slot", ` did ${guess.real.join(", ")}`));
    if (!guess.known) chip.append(make("span", "slot", " · had neither seen nor heard it"));
    return chip;
  }));
  if (view.foresees.length) row("foresees", ...view.foresees.map((each) => {
    const chip = make("span", judged(each.right), make("span", "slot", each.slot + " "), each.expected + mark(each.right));
    if (each.right === false) chip.append(make("span", "slot", ` came ${each.came}`));
    return chip;
  }));
  row("says", view.says === null ? make("span", "soft", "nothing") : make("span", "quote", `“${view.says}”`), view.bits === null ? "" : make("span", "soft small", `  ${view.bits.toFixed(2)} bits`));
  card.append(list);
  if (view.weighed.length) card.append(drawPlan(view.weighed));
  return card;
}
function drawWorld(replay, frame) {
  const world = isGrid(frame.board) ? drawGrid(frame.board) : make("pre", frame.board.length ? "" : "state", frame.board.length ? frame.board.join("\n") : frame.state);
  byId("stage").classList.toggle("wide", !isGrid(frame.board) && frame.board.some((row) => row.length > 34));
  byId("world").replaceChildren(world);
  byId("legend").textContent = replay.legend;
}
