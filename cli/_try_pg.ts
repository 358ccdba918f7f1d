const s = "npm:pg@^8.16.0";
const m = await import(s);
console.log(Object.keys(m), Object.keys(m.default).slice(0,20));
const pg = m.default;
const u = new URL(Deno.args[0]);
const pool = new pg.Pool({host:u.hostname,port:Number(u.port),user:u.username,password:()=>decodeURIComponent(u.password),database:u.pathname.slice(1),ssl:false,application_name:"effectonce",connectionTimeoutMillis:5000,keepAlive:true});
pool.on("error",()=>{});
try { const c = await pool.connect(); console.log((await c.query("select version()")).rows); c.release(); } catch (e) { console.log("ERR", e.name, e.code, JSON.stringify(e.message), e.errors, e.constructor.name); }
await pool.end();
