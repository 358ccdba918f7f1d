/** The requirements of stores, sources and atomic sinks on MariaDB. */
import { mysqlEnds } from "./servers/mysql.ts";
import { suites } from "./servers/suites.ts";

suites("mariadb", mysqlEnds("mariadb"));
