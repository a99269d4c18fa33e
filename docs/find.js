// Runs the search of the built site: node docs/find.js WORKER, on standard input the index and queries.
// Prints what the search's worker answers to each query, as JSON.
const fs = require("fs");
const vm = require("vm");

const { index, queries } = JSON.parse(fs.readFileSync(0));
const answers = [];
let worker;
// What a browser gives a worker.
const scope = vm.createContext({
  addEventListener: (_, handler) => { worker = handler; },
  console,
  postMessage: (message) => answers.push(message.data),
});
scope.self = scope;
vm.runInContext(fs.readFileSync(process.argv[2], "utf8"), scope);

const [SETUP, QUERY] = [0, 2];
(async () => {
  await worker({ data: { type: SETUP, data: { ...index, options: {} } } });
  for (const query of queries) await worker({ data: { type: QUERY, data: query } });
  console.log(JSON.stringify(answers.slice(1).map(({ items }) => items)));
})();
