/** The requirements of stores, sources and atomic sinks on PostgreSQL; then what is its own. */
import { postgresEnds } from "./servers/postgres.ts";
import { suites } from "./servers/suites.ts";

suites("postgres", postgresEnds());
