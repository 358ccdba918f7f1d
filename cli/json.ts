/**
 * JSON that a person writes: what is wrong is said with its place, a member that is there twice is wrong, and no message shows
 * the text, which may hold a secret. `JSON.parse` does none of these.
 *
 * @module
 */

/** What a file says. */
export type JsonValue = null | boolean | number | string | readonly JsonValue[] | JsonObject;
/** An object: a map, since `__proto__` is a name like any other. */
export type JsonObject = ReadonlyMap<string, JsonValue>;

/** `JSON.parse` looks into texts and numbers; this only finds where they end. */
const TOKEN = /[ \t\r\n]*(?:([[\]{},:])|("(?:[^"\\]|\\.)*"|[-+.\w]+)|$)/sy;

/**
 * Reads a text.
 *
 * @throws {SyntaxError} If it is not JSON, or an object has a member twice: with line and column.
 */
export function parseJson(text: string): JsonValue {
  let at = text.startsWith("\ufeff") ? 1 : 0;
  let start = at;

  function fail(what: string): never {
    const lines = text.slice(0, start).split("\n");
    throw new SyntaxError(`line ${lines.length}, column ${lines.at(-1)!.length + 1}: ${what}`);
  }
  /** The next token; empty at the end. */
  function next(): string {
    TOKEN.lastIndex = at;
    const [whole, mark, scalar] = TOKEN.exec(text) ?? [];
    const token = mark ?? scalar ?? "";
    start = whole === undefined ? at + /^[ \t\r\n]*/.exec(text.slice(at))![0].length : at + whole.length - token.length;
    if (whole === undefined) fail("this is not JSON");
    at += whole.length;
    return token;
  }
  function list(): JsonValue {
    const items: JsonValue[] = [];
    for (let token = next(); token !== "]" || items.length > 0; token = next()) {
      items.push(value(token));
      const mark = next();
      if (mark === "]") break;
      if (mark !== ",") fail("here must be a comma or ]");
    }
    return items;
  }
  function object(): JsonValue {
    const members = new Map<string, JsonValue>();
    for (let token = next(); token !== "}" || members.size > 0; token = next()) {
      if (!token.startsWith('"')) fail("here must be the name of a member, in double quotes");
      const name = scalar(token) as string;
      if (members.has(name)) fail(`"${name}" is there twice`);
      if (next() !== ":") fail("here must be a colon");
      members.set(name, value(next()));
      const mark = next();
      if (mark === "}") break;
      if (mark !== ",") fail("here must be a comma or }");
    }
    return members;
  }
  function value(token: string): JsonValue {
    if (token === "[") return list();
    if (token === "{") return object();
    if (token === "") fail("the text ends too early");
    if (/^[\]},:]$/.test(token)) fail("here must be a value");
    return scalar(token);
  }
  function scalar(token: string): JsonValue {
    try {
      return JSON.parse(token);
    } catch {
      return fail("this is not JSON");
    }
  }

  const read = value(next());
  if (next() !== "") fail("here must be the end");
  return read;
}
