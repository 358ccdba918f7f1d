/**
 * Permissions that Deno was not given. A command says which flag is missing, and never lets Deno ask at the terminal.
 *
 * @module
 */

/** What a permission is for; empty for everything. */
function scopeOf(permission: Deno.PermissionDescriptor): string {
  switch (permission.name) {
    case "read":
    case "write":
      return `${permission.path ?? ""}`;
    case "net":
      return permission.host ?? "";
    case "env":
      return permission.variable ?? "";
    case "sys":
      return permission.kind ?? "";
    default:
      return "";
  }
}

/** The flags that would give permissions. */
function flagsFor(permissions: readonly Deno.PermissionDescriptor[]): string {
  const kinds = Map.groupBy(permissions, ({ name }) => name);
  return Array.from(kinds, ([name, all]) => {
    const scopes = all.map(scopeOf).filter((scope) => scope !== "");
    return `--allow-${name}${scopes.length > 0 ? `=${scopes.join(",")}` : ""}`;
  }).join(" and ");
}

/** Whether something is permitted, without being asked for. */
export function permitted(permission: Deno.PermissionDescriptor): boolean {
  return Deno.permissions.querySync(permission).state === "granted";
}

/**
 * Makes sure that these are permitted.
 *
 * @param what Who needs them: the subject of the sentence.
 * @throws {Error} If not.
 */
export function need(what: string, ...permissions: readonly Deno.PermissionDescriptor[]): void {
  const missing = permissions.filter((permission) => !permitted(permission));
  if (missing.length > 0) throw new Error(`${what} needs ${flagsFor(missing)}`);
}

/** Whether Deno would ask a person for what is not permitted, instead of refusing it. */
export function asks(): boolean {
  return Deno.stdin.isTerminal() && Deno.stderr.isTerminal();
}
