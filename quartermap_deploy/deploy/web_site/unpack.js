// Starts the site where it was opened as a file. Browsers let such a page read nothing that lies beside it but scripts,
// so packed.js holds everything: gzip in pieces of base64. Each part gets an address of its own, in the order of PACKED, and
// takes the place of its name, "./name", in the scripts that come after it.

"use strict";

(async () => {
  const addresses = new Map();
  const types = { js: "text/javascript", mjs: "text/javascript", json: "application/json" };
  for (const [name, pieces] of Object.entries(PACKED)) {
    const compressed = new Blob(pieces.map(piece => Uint8Array.from(atob(piece), letter => letter.charCodeAt(0))));
    const stream = compressed.stream().pipeThrough(new DecompressionStream("gzip"));
    const type = types[name.split(".").pop()] ?? "application/octet-stream";
    let content = await new Response(stream).blob();
    if (type === "text/javascript") {
      let text = await content.text();
      for (const [known, address] of addresses) text = text.replaceAll(`"./${known}"`, `"${address}"`);
      content = text;
    }
    addresses.set(name, URL.createObjectURL(new Blob([content], { type })));
    delete PACKED[name];
  }
  await import(addresses.get("page.js"));
})();
