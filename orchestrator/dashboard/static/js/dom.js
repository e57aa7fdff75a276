// Elements from data. Text is always text: nothing here can turn a string into markup.

const SVG = "http://www.w3.org/2000/svg";

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "style")
      for (const [k, v] of Object.entries(value)) node.style.setProperty(k, v);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

export const h = (tag, attributes = {}, ...children) =>
  fill(document.createElement(tag), attributes, children);

export const s = (tag, attributes = {}, ...children) =>
  fill(document.createElementNS(SVG, tag), attributes, children);

/** A word that does something; it says "copied" or the like for a moment. */
export function action(word, does, { said = "", label = null } = {}) {
  const button = h("button", { type: "button", class: "word", "aria-label": label }, word);
  button.addEventListener("click", async () => {
    await does(button);
    if (!said) return;
    button.textContent = said;
    setTimeout(() => (button.textContent = word), 1600);
  });
  return button;
}

/** A command to type, with a word that copies it. */
export function command(text) {
  return h("span", { class: "command" }, h("code", {}, text), " ", copy(text));
}

export function copy(text, word = "copy") {
  return action(word, () => navigator.clipboard?.writeText(text), { said: "copied" });
}

/** Replaces the children only if what they say has changed, so that a selection survives. */
export function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}
