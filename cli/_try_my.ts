const s = "npm:mysql2@^3.15.0/promise";
const m = await import(s);
console.log(Object.keys(m));
const my = m.default;
const u = new URL(Deno.args[0]);
const pool = my.createPool({host:u.hostname,port:Number(u.port),user:u.username,password:decodeURIComponent(u.password),database:u.pathname.slice(1),connectTimeout:5000, charset:"utf8mb4", ssl: Deno.args[1] ? {rejectUnauthorized:false}: undefined});
pool.on("error",()=>{});
try { const c = await pool.getConnection(); console.log((await c.query("select version() v, @@character_set_results c, @@collation_connection, now() n"))[0]); c.release(); } catch (e) { console.log("ERR", e.name, e.code, e.errno, JSON.stringify(e.message), e.errors, e.constructor.name); }
await pool.end();
