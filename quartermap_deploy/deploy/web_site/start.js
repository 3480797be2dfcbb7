// What the page starts as a worker: it loads the module that does the work.

import("./worker.js").catch(error =>
  postMessage({ kind: "fault", id: null, text: String(error.message ?? error) }),
);
