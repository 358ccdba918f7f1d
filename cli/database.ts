/**
 * What a command knows of a database, whichever it is.
 *
 * @module
 */
import type { EffectStore, Outbox } from "../mod.ts";

/** A database that is open. */
export interface Database {
  /** Its URL, without secrets. */
  readonly name: string;
  /** The same for every URL of the same tables. */
  identity(): Promise<string>;
  /** Whether its server was away when it was opened, which {@linkcode OpenOptions.mayBeAway} allowed. */
  readonly away: boolean;
  /** Its claims. */
  readonly store: EffectStore<unknown>;
  /** Its outbox, or some topics of it. */
  outbox(options: { readonly topics?: readonly string[]; readonly keep?: boolean }): Outbox;
  /** Creates or upgrades its tables. */
  migrate(options?: MigrateOptions): Promise<void>;
  /** Takes its claims, after a restore or in a copy, for all that there were; undefined where it does not notice these. */
  readonly accept: (() => Promise<void>) | undefined;
  /** What `doctor` finds. */
  checks(): Promise<readonly Check[]>;
  /** Lets go of it. */
  close(): Promise<void>;
}

/** How to make tables. */
export interface MigrateOptions {
  /**
   * Whether an INSERT wakes relays, where the database can.
   *
   * @default {true}
   */
  readonly notify?: boolean;
  /**
   * Over how many relays at once messages can be shared out, where the database can.
   *
   * @default {undefined} As it is; at first 1.
   */
  readonly shards?: number;
}

/** How to open a database. */
export interface OpenOptions {
  /**
   * Whether it may be new.
   *
   * @default {false}
   */
  readonly create?: boolean;
  /**
   * Whether its server may be away, since whoever uses it waits for it.
   *
   * @default {false}
   */
  readonly mayBeAway?: boolean;
  /**
   * Whether a value that does not fit its column is an error, also where the server would cut it.
   *
   * @default {false} As the server is set.
   */
  readonly strict?: boolean;
}

/** One thing that `doctor` looked at. */
export interface Check {
  /** What was looked at. */
  readonly what: string;
  /** Whether it is as it should be. */
  readonly ok: boolean;
  /** What was found. */
  readonly found: string;
}
