"use strict";
// The charts and the table of pairs. Texts come from JSON and are only ever set as text, never as markup.
(() => {
  const json = (id) => JSON.parse(document.getElementById(id).textContent);
  const make = (tag, text, attributes = {}) => {
    const element = document.createElement(tag);
    if (text !== undefined && text !== null) element.textContent = text;
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    return element;
  };

  // Charts. `ast` makes Vega interpret its expressions, so that the page needs no eval.
  const { config, specs } = json("charts");
  const drawn = new Set();
  const draw = async (place) => {
    if (drawn.has(place) || place.closest("details:not([open])")) return;
    drawn.add(place);
    try {
      await vegaEmbed(place, specs[place.id], {
        mode: "vega-lite", config, ast: true, actions: false, renderer: "svg", tooltip: { disableDefaultStyle: true },
      });
    } catch (error) {
      place.textContent = `This chart cannot be drawn: ${error.message}`;
    }
  };
  const drawAll = async (within) => {
    for (const place of within.querySelectorAll(".chart")) await draw(place);
  };
  for (const folded of document.querySelectorAll("details"))
    folded.addEventListener("toggle", () => drawAll(folded));

  // Pairs.
  const SHOWN = 25;
  const number = (value, digits) =>
    value === null ? "–" : value.toFixed(digits).replace("-", "−");
  const table = (card) => {
    const { columns, rows, fates } = json(card.dataset.pairs);
    const at = Object.fromEntries(columns.map((name, index) => [name, index]));
    const texts = [at.prompt, at.chosen, at.rejected];
    const searched = rows.map((row) => texts.map((index) => row[index]).join("\n").toLowerCase());
    const [words, language, fate] = card.querySelectorAll("input, select");
    const body = card.querySelector("tbody");
    const heads = [...card.querySelectorAll("th button")];
    const more = card.querySelector(".more");
    const said = card.querySelector(".found");
    let sorted = at.score, up = true, shown = SHOWN;
    for (const tag of [...new Set(rows.map((row) => row[at.language]))].sort())
      language.append(make("option", tag, { value: tag }));
    fates.forEach((name, index) => fate.append(make("option", name, { value: index })));

    const opened = (row) => {
      const line = make("tr", null, { class: "texts" });
      const cell = make("td", null, { colspan: heads.length });
      for (const name of ["prompt", "chosen", "rejected"]) {
        cell.append(make("b", name));
        cell.append(make("p", row[at[name]], { dir: "auto", lang: row[at.language] }));
      }
      line.append(cell);
      return line;
    };
    const line = (row) => {
      const element = make("tr", null, { class: "pair" });
      element.append(make("td", row[at.language]));
      const tag = make("td");
      const name = fates[row[at.fate]];
      tag.append(make("span", name.split(" ").pop(), { class: `tag fate-${row[at.fate]}`, title: name }));
      element.append(tag);
      for (const [name, digits, style] of
        [["score", 3, ""], ["worst", 3, "wide"], ["margin", 2, ""], ["chosen_tokens", 0, "wide"], ["rejected_tokens", 0, "wide"]])
        element.append(make("td", number(row[at[name]], digits), { class: `number ${style}` }));
      const text = make("td", null, { class: "excerpt" });
      const button = make("button", row[at.prompt].slice(0, 140), {
        type: "button", dir: "auto", lang: row[at.language], "aria-expanded": "false",
      });
      button.addEventListener("click", () => {
        const open = button.getAttribute("aria-expanded") === "true";
        button.setAttribute("aria-expanded", String(!open));
        if (open) element.nextSibling.remove();
        else element.after(opened(row));
      });
      text.append(button);
      element.append(text);
      return element;
    };
    const show = () => {
      const wanted = words.value.trim().toLowerCase();
      const found = rows
        .map((row, index) => ({ row, index }))
        .filter(({ row, index }) =>
          (!wanted || searched[index].includes(wanted)) &&
          (!language.value || row[at.language] === language.value) &&
          (!fate.value || row[at.fate] === Number(fate.value)));
      const rank = (a, b) => {
        const [x, y] = [a.row[sorted], b.row[sorted]];
        if (x === null || y === null) return (x === null) - (y === null);
        const order = typeof x === "number" ? x - y : x < y ? -1 : x > y ? 1 : 0;
        return (up ? order : -order) || a.index - b.index;
      };
      found.sort(rank);
      body.replaceChildren(...found.slice(0, shown).map(({ row }) => line(row)));
      said.textContent = `${found.length} of ${rows.length} pairs`;
      more.hidden = found.length <= shown;
      for (const head of heads) {
        const mine = at[head.dataset.column] === sorted;
        head.parentElement.setAttribute("aria-sort", mine ? (up ? "ascending" : "descending") : "none");
      }
    };
    for (const input of [words, language, fate])
      input.addEventListener("input", () => { shown = SHOWN; show(); });
    for (const head of heads)
      head.addEventListener("click", () => {
        const column = at[head.dataset.column];
        up = column === sorted ? !up : true;
        sorted = column;
        shown = SHOWN;
        show();
      });
    more.addEventListener("click", () => { shown += 4 * SHOWN; show(); });
    show();
  };

  // Contents: every card, but those of older iterations, which have one link each.
  const contents = document.querySelector("nav");
  document.querySelectorAll("h2, h3").forEach((heading, index) => {
    if (heading.tagName === "H3" && heading.closest("[data-older]")) return;
    heading.id = `part-${index}`;
    contents.append(make("a", heading.textContent, { href: `#part-${index}` }));
  });

  document.documentElement.classList.add("scripted");
  for (const card of document.querySelectorAll("[data-pairs]")) table(card);
  drawAll(document);
})();
