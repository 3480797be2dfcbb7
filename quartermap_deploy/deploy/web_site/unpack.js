// Starts the site where it was opened as a file. Browsers let such a page read nothing that lies beside it but scripts,
// so packed.js holds everything: gzip in pieces of base64. Each part gets an address of its own, in the order in which
// it stands there, and that takes the place of its name, "./name", in the scripts that come after it.

"use strict";

// packed: pieces by name. entry: the script to begin with. addresses: those that are known already.
async function unpack(packed, entry, addresses) {
  const types = { js: "text/javascript", mjs: "text/javascript", json: "application/json" };
  for (const [name, pieces] of Object.entries(packed)) {
    const compressed = new Blob(
      pieces.map(piece => Uint8Array.from(atob(piece), letter => letter.charCodeAt(0))),
    );
    const content = new Response(compressed.stream().pipeThrough(new DecompressionStream("gzip")));
    const type = types[name.split(".").pop()] ?? "application/octet-stream";
    let part = await content.blob();
    if (type === "text/javascript") {
      part = await part.text();
      for (const [known, address] of addresses) part = part.replaceAll(`"./${known}"`, `"${address}"`);
    }
    addresses.set(name, URL.createObjectURL(new Blob([part], { type })));
  }
  await import(addresses.get(entry));
}

// A worker that such a page starts has an origin of its own, and can load nothing that the page made an address for. So
// it is given its parts in its own script, and unpacks them itself.
const starter = new Blob([
  `${unpack}\nunpack(`,
  JSON.stringify(PACKED.worker),
  ', "worker.js", new Map())',
  '.catch(error => postMessage({ kind: "fault", id: null, text: String(error.message ?? error) }));',
]);
delete PACKED.worker;

unpack(PACKED.page, "page.js", new Map([["start.js", URL.createObjectURL(starter)]])).catch(error => {
  document.getElementById("status").textContent = `The page cannot be unpacked: ${error.message ?? error}`;
});
