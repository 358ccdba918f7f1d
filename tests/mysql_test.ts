/** The requirements of stores, sources and atomic sinks on MySQL; then what is its own. */
import { mysqlEnds } from "./servers/mysql.ts";
import { suites } from "./servers/suites.ts";

suites("mysql", mysqlEnds("mysql"));
