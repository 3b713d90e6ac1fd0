/* Ask the search of a built site with its own code: node docs/website/finding.js FOLDER QUESTION... */
const fs = require("fs");
const path = require("path");
const vm = require("vm");

const [folder, ...questions] = process.argv.slice(2);
const nothing = { addEventListener() {}, getElementById: () => null, querySelectorAll: () => [] };
const context = vm.createContext({
  document: nothing,
  localStorage: { setItem() {} },
  SPHINX_HIGHLIGHT_ENABLED: false,
  _: (text) => text,
  _ready: () => {},
});
context.window = context;
for (const file of ["_static/language_data.js", "_static/searchtools.js"])
  vm.runInContext(fs.readFileSync(path.join(folder, file), "utf8"), context);
vm.runInContext(fs.readFileSync(path.join(folder, "searchindex.js"), "utf8"), context);
const ask = (question) =>
  vm.runInContext(`Search._performSearch(...Search._parseQuery(${JSON.stringify(question)}))`, context)
    .reverse()
    .map((result) => result[0]);
console.log(JSON.stringify(questions.map((question) => [...new Set(ask(question))])));
