/**
 * The flags of a relay: the one table behind the command line, the environment, the file and its schema.
 *
 * @module
 */
import type { FlagTable } from "./flags.ts";

/** The flags of `relay`, and of what looks at a relay. */
export const RELAY_FLAGS: FlagTable = {
  from: { kind: "url", required: true, help: "the outbox: sqlite:app.db, postgres:…, mysql:…; or kafka://…/topic?group=…" },
  to: { kind: "url", required: true, help: "the target: kafka://…, http(s)://…, postgres:…, file:events.jsonl, stdout:" },
  handler: { kind: "text", value: "FILE", help: "into a database: whose default export is a function (message, client)" },
  name: { kind: "name", default: "default", file: "none", help: "scope of the relay's effects; of a file: only this relay" },
  topics: { kind: "names", help: "only these topics (all)" },
  drain: { kind: "switch", file: "top", help: "stop when nothing deliverable is left" },
  store: { kind: "url", help: "where calls are claimed (beside the outbox)" },
  "effect-key": {
    kind: "text",
    value: "KEY",
    help: "from kafka: claim by header:NAME or json:FIELD.FIELD, not by the offset",
  },
  idempotent: { kind: "switch", help: "the target dedupes by the Idempotency-Key header: repeat after an interruption" },
  "dedupe-window-ms": {
    kind: "number",
    min: 1,
    max: Number.MAX_SAFE_INTEGER,
    default: 86_400_000,
    help: "how long the target remembers a key",
  },
  reconcile: { kind: "url", help: "ask here about one in doubt; {id}, {idempotencyKey}, {key}, {topic} are filled in" },
  "settle-ms": { kind: "number", default: 5_000, help: "ask only so long after the doubtful attempt" },
  "header-to": { kind: "pairs", help: "send this header too; VALUE may be env:VARIABLE" },
  method: { kind: "text", oneOf: ["POST", "PUT"], default: "POST", help: "HTTP method" },
  "timeout-ms": { kind: "number", min: 1, default: 10_000, help: "for one HTTP call" },
  lanes: { kind: "number", min: 1, default: 8, help: "calls at the same time" },
  batch: { kind: "number", min: 1, help: "messages in hand, or in one commit (100; 1000 into kafka:)" },
  "lease-ms": { kind: "number", min: 10, default: 30_000, help: "how long others wait for a silent relay" },
  attempts: { kind: "number", min: 1, default: 10, help: "before a message is parked" },
  "min-retry-ms": { kind: "number", default: 200, help: "first bound of the back-off" },
  "max-retry-ms": { kind: "number", default: 60_000, help: "last bound of the back-off" },
  "on-park": {
    kind: "text",
    oneOf: ["block", "skip"],
    default: "block",
    help: "a parked message holds back its key, or only itself",
  },
  "poll-ms": { kind: "number", min: 1, default: 50, help: "how often to look when idle" },
  keep: { kind: "switch", help: "keep delivered rows until prune" },
  "accept-source": {
    kind: "switch",
    file: "none",
    help: "the database was restored or copied: go on with what it knows; into kafka: asks first",
  },
  yes: { kind: "switch", file: "none", help: "with --accept-source: do not ask" },
  "create-topics": { kind: "switch", help: "into kafka: create a topic that does not exist" },
  "allow-duplicates": { kind: "switch", help: "no claims: at-least-once" },
  listen: {
    kind: "text",
    value: "HOST:PORT",
    file: "top",
    help: "answer GET /live, /ready and /metrics here; PORT alone is on 127.0.0.1",
  },
  "ready-ms": {
    kind: "number",
    min: 1,
    default: 30_000,
    help: "/ready: at most so long without a delivery while there is work",
  },
  config: { kind: "name", value: "FILE", file: "none", help: "read the relays from this JSON file" },
  json: { kind: "switch", file: "top", help: "print the events as JSON lines" },
};
