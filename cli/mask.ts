/**
 * What a person may see of a value that can hold a secret.
 *
 * @module
 */

const HIDDEN = "***";

/** Whether it only names a variable: that is no secret, but what is none of a variable's name may be one. */
const isVariable = (text: string): boolean => /^env:[A-Za-z_]\w*$/.test(text);

/** Parameters of databases that are no secrets. */
const SHOWN = /^(driver|schema|prefix|outbox|columns|layout|stored|pool|sslmode|sslrootcert|listen)$/;

/** Parameters of Kafka that are no secrets. */
const SHOWN_OF_KAFKA = /^(transactions|cursor|copies|min-insync|transaction-timeout-ms|sasl|sslmode|sslrootcert)$/;

/** A query without its values, but for those that say which database is meant. */
function maskedQuery(scheme: string, query: string): string {
  const shown = /^(postgres|postgresql|mysql|mariadb):$/i.test(scheme)
    ? SHOWN
    : /^kafka:$/i.test(scheme)
    ? SHOWN_OF_KAFKA
    : /^$/;
  return query.replace(/([^?&=]*)=[^&]*/g, (whole, name) => name !== "" && shown.test(name) ? whole : `${name}=${HIDDEN}`);
}

/** A URL without user, password, fragment and the values of its query. */
export function maskedUrl(url: string): string {
  if (isVariable(url)) return url;
  const [, scheme, host, path, query, hash] = /^([a-z][a-z0-9+.-]*:)(\/\/[^/\\?#]*)?([^?#]*)(\?[^#]*)?(#.*)?$/is.exec(url) ??
    [];
  if (scheme === undefined) return HIDDEN;
  // A path of a file has neither.
  if (host === undefined) return /^(sqlite|file|stdout):$/i.test(scheme) ? url : scheme + HIDDEN;
  // Such as a password with a slash in it: nobody knows where it ends.
  // Of several brokers the first will do.
  if (/^kafka:/i.test(scheme) && path!.includes("@")) return scheme + HIDDEN;
  if (!URL.canParse(/^kafka:/i.test(url) ? url.replace(/,[^@/?#]*/, "") : url)) return scheme + HIDDEN;
  const shownQuery = maskedQuery(scheme, query ?? "");
  return `${scheme}${host.replace(/\/\/.*@/s, `//${HIDDEN}@`)}${path}${shownQuery}${hash === undefined ? "" : `#${HIDDEN}`}`;
}

/** The same as one word of a shell: zsh takes a bare question mark for a pattern. */
export function shellUrl(url: string): string {
  const shown = maskedUrl(url);
  return /^[\w:./@%+,=-]+$/.test(shown) ? shown : `'${shown.replaceAll("'", `'\\''`)}'`;
}

/** A header's value. */
export function maskedHeader(value: string): string {
  return isVariable(value) ? value : HIDDEN;
}

/** A word that is in the wrong place, and could be a URL that was meant for a flag. */
export function maskedWord(word: string): string {
  return /[@?]|:\/\//.test(word) ? maskedUrl(word) : word;
}
