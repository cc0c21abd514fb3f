// A Forward server: node server.js LISTEN OUT DELAY_MS [CERT KEY]
//
// It appends each event to OUT as a line of JSON before it acknowledges it. (The
// library acknowledges first; a kill between the two would look like our loss.)
"use strict";
const fs = require("fs");
const load = name => require(require.resolve(name, {paths: [process.env.NODE_PATH]}));
const {FluentServer} = load("@fluent-org/logger");
const protocol = load("@fluent-org/logger/build/src/protocol");

const [listen, out, delay, cert, key] = process.argv.slice(2);
const file = fs.openSync(out, "a");
const text = (_, v) => (typeof v === "bigint" ? v.toString() : v);

const parse = protocol.parseTransport;
protocol.parseTransport = message => {
  const got = parse(message);
  if (Number(delay) > 0) Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, Number(delay));
  for (const [time, record] of got.entries) {
    const at = typeof time === "number" ? {seconds: time, nanoseconds: 0} : {seconds: time.epoch, nanoseconds: time.nano};
    fs.writeSync(file, JSON.stringify({tag: got.tag, time: at, record}, text) + "\n");
  }
  return got;
};

const server = new FluentServer({
  listenOptions: listen.startsWith("/") ? {path: listen} : {host: "127.0.0.1", port: Number(listen)},
  tlsOptions: cert && {cert: fs.readFileSync(cert), key: fs.readFileSync(key)},
});
server.listen().then(() => console.log(server.port || "listening"));
