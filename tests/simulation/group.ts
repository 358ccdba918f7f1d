/**
 * A model of a consumer group as its coordinator has it: the classic protocol, by which members join, are shared the partitions,
 * beat, keep offsets and leave. https://cwiki.apache.org/confluence/display/KAFKA/Kafka+Client-side+Assignment+Proposal
 *
 * @module
 */
import type { GroupOffset } from "../../adapters/kafka_source.ts";
import type { Simulation } from "./scheduler.ts";

/** What the coordinator says: `unknown` is one that was given up, `outside` one that has to join the next generation. */
export type GroupAnswer<T> = { readonly done: true; readonly value: T } | {
  readonly done: false;
  readonly why: "unknown" | "outside";
};

/** A generation, as a member that has joined it hears of it. */
export interface Generation {
  /** From 1. */
  readonly number: number;
  /** All members, for the one that shares out; else undefined. */
  readonly members: readonly string[] | undefined;
}

/** What each member of a generation is given. */
export type Shares = ReadonlyMap<string, readonly number[]>;

interface Member {
  readonly id: string;
  readonly sessionMs: number;
  /** Then it is given up, if it has not been heard of. */
  until: number;
  /** Its requests to join and for its share that are not answered yet. */
  readonly joins: ((answer: GroupAnswer<Generation>) => void)[];
  readonly syncs: ((answer: GroupAnswer<readonly number[]>) => void)[];
  share: readonly number[];
}

const done = <T>(value: T): GroupAnswer<T> => ({ done: true, value });
const not = (why: "unknown" | "outside"): GroupAnswer<never> => ({ done: false, why });

/** How a group behaves. */
export interface GroupOptions {
  /** How long the first member waits for others. */
  readonly initialMs: number;
  /** Asked when the last member has gone: whether what it keeps expires. */
  readonly expires: () => boolean;
  /** Hears of each offset that is to be kept, and by whom. */
  readonly onKept: (partition: number, place: GroupOffset, member: string) => void;
}

/** A group, which no process takes down with it. */
export class Group {
  /** What it keeps, by partition. */
  readonly kept: Map<number, GroupOffset> = new Map();
  readonly #simulation: Simulation;
  readonly #options: GroupOptions;
  readonly #members: Map<string, Member> = new Map();
  /** Ids that were given out to those who have not joined yet. */
  readonly #invited: Set<string> = new Set();
  #state: "empty" | "preparing" | "completing" | "stable" = "empty";
  #number = 0;
  #ids = 0;
  #leader: string | undefined;

  /** A group that nobody has joined. */
  constructor(simulation: Simulation, options: GroupOptions) {
    this.#simulation = simulation;
    this.#options = options;
  }

  /** Whether it has no members. */
  get isEmpty(): boolean {
    return this.#members.size === 0;
  }

  /** An id for one that will join. */
  invite(sessionMs: number): string {
    const id = `member-${++this.#ids}`;
    this.#invited.add(id);
    this.#simulation.at(this.#simulation.now + sessionMs, () => {
      if (this.#invited.delete(id)) this.#completeJoin();
    });
    return id;
  }

  /** Answers when all have joined, or those that have not are given up. */
  join(id: string, sessionMs: number): Promise<GroupAnswer<Generation>> {
    let member = this.#members.get(id);
    if (!member) {
      if (!this.#invited.delete(id)) return Promise.resolve(not("unknown"));
      member = { id, sessionMs, until: 0, joins: [], syncs: [], share: [] };
      this.#members.set(id, member);
      this.#leader ??= id;
      this.#watch(member);
    } else if (this.#state === "completing" || this.#state === "stable" && this.#leader !== id) {
      // Nothing has changed about it: it may have missed the answer.
      return Promise.resolve(done(this.#generationFor(member)));
    }
    const answer = new Promise<GroupAnswer<Generation>>((resolve) => member.joins.push(resolve));
    if (this.#state === "preparing") this.#completeJoin();
    else this.#rebalance(this.#state === "empty" ? this.#options.initialMs : 0);
    return answer;
  }

  #generationFor({ id }: Member): Generation {
    return { number: this.#number, members: id === this.#leader ? [...this.#members.keys()] : undefined };
  }

  /** All have to join anew, by a time. */
  #rebalance(waitMs: number): void {
    for (const { syncs } of this.#members.values()) for (const answer of syncs.splice(0)) answer(not("outside"));
    this.#state = "preparing";
    const number = this.#number;
    const isLate = () => this.#state === "preparing" && this.#number === number;
    const timeoutMs = waitMs || Math.max(...Array.from(this.#members.values(), ({ sessionMs }) => sessionMs));
    this.#simulation.at(this.#simulation.now + timeoutMs, () => isLate() && this.#completeJoin(true));
    if (waitMs === 0) this.#completeJoin();
  }

  #completeJoin(late = false): void {
    if (this.#state !== "preparing") return;
    const absent = [...this.#members.values()].filter(({ joins }) => joins.length === 0);
    if (!late && (absent.length > 0 || this.#invited.size > 0)) return;
    for (const { id } of absent) {
      this.#simulation.log(() => `the group gives up ${id}, which has not joined anew`);
      this.#members.delete(id);
    }
    if (!this.#members.has(this.#leader ?? "")) this.#leader = this.#members.keys().next().value;
    if (this.#isEmptied()) return;
    this.#number++;
    this.#state = "completing";
    this.#simulation.log(() => `generation ${this.#number} of the group: ${[...this.#members.keys()].join(" ")}`);
    const number = this.#number;
    for (const member of this.#members.values()) {
      this.#hear(member);
      for (const answer of member.joins.splice(0)) answer(done(this.#generationFor(member)));
    }
    // Who does not ask for its share is given up, as one that does not join.
    const timeoutMs = Math.max(...Array.from(this.#members.values(), ({ sessionMs }) => sessionMs));
    this.#simulation.at(this.#simulation.now + timeoutMs, () => {
      if (this.#number !== number || this.#state !== "completing") return;
      const silent = [...this.#members.values()].filter(({ syncs }) => syncs.length === 0);
      for (const { id } of silent) this.#remove(id);
    });
  }

  /** Answers a member's share, once the one that shares out has said it. */
  sync(id: string, number: number, shares: Shares | undefined): Promise<GroupAnswer<readonly number[]>> {
    const member = this.#members.get(id);
    if (!member) return Promise.resolve(not("unknown"));
    if (number !== this.#number || this.#state === "preparing") return Promise.resolve(not("outside"));
    this.#hear(member);
    if (this.#state === "stable") return Promise.resolve(done(member.share));
    const answer = new Promise<GroupAnswer<readonly number[]>>((resolve) => member.syncs.push(resolve));
    if (shares && id === this.#leader) {
      this.#state = "stable";
      for (const one of this.#members.values()) {
        one.share = shares.get(one.id) ?? [];
        this.#simulation.log(() => `${one.id} is given ${one.share.join(" ") || "nothing"}`);
        this.#hear(one);
        for (const answer of one.syncs.splice(0)) answer(done(one.share));
      }
    }
    return answer;
  }

  #inside(id: string, number: number): GroupAnswer<Member> {
    const member = this.#members.get(id);
    if (!member) return not("unknown");
    if (number !== this.#number) return not("outside");
    this.#hear(member);
    return done(member);
  }

  /** One says that it is alive. */
  beat(id: string, number: number): GroupAnswer<null> {
    const found = this.#inside(id, number);
    return !found.done ? found : this.#state === "preparing" ? not("outside") : done(null);
  }

  /** Keeps offsets: also while all are to join anew, for those that have not yet. */
  keep(id: string, number: number, offsets: ReadonlyMap<number, GroupOffset>): GroupAnswer<null> {
    const found = this.#inside(id, number);
    if (!found.done) return found;
    if (this.#state === "completing") return not("outside");
    for (const [partition, place] of offsets) {
      this.#simulation.log(() => `the group is at ${place.offset} of partition ${partition}, ${place.note}`);
      this.#options.onKept(partition, place, id);
      this.kept.set(partition, place);
    }
    return done(null);
  }

  /** One goes. */
  leave(id: string): GroupAnswer<null> {
    if (!this.#members.has(id)) return not("unknown");
    this.#remove(id);
    return done(null);
  }

  #hear(member: Member): void {
    member.until = this.#simulation.now + member.sessionMs;
  }

  #watch(member: Member): void {
    this.#hear(member);
    const look = () => {
      if (this.#members.get(member.id) !== member) return;
      // Who waits for the others is alive.
      if (member.joins.length > 0 || member.syncs.length > 0) this.#hear(member);
      if (member.until <= this.#simulation.now) {
        this.#simulation.log(() => `the group gives up ${member.id}, which is silent`);
        this.#remove(member.id);
      } else this.#simulation.at(member.until, look);
    };
    this.#simulation.at(member.until, look);
  }

  #remove(id: string): void {
    const member = this.#members.get(id);
    if (!member) return;
    this.#members.delete(id);
    for (const answer of [...member.joins, ...member.syncs]) answer(not("unknown"));
    if (this.#leader === id) this.#leader = this.#members.keys().next().value;
    if (this.#state === "preparing") this.#completeJoin();
    else if (!this.#isEmptied()) this.#rebalance(0);
  }

  #isEmptied(): boolean {
    if (this.#members.size > 0) return false;
    this.#number++;
    this.#state = "empty";
    if (this.#options.expires()) {
      this.#simulation.log(() => "the offsets of the group expire");
      this.kept.clear();
    }
    return true;
  }
}
