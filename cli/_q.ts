import pg from "pg"; import mysql from "mysql2/promise";
const [kind, sql] = Deno.args;
if (kind==="postgres"){const c=new pg.Client({connectionString:Deno.env.get("EFFECTONCE_POSTGRES_URL")});await c.connect();try{console.log(JSON.stringify((await c.query(sql)).rows??(0)));}finally{await c.end();}}
else {const c=await mysql.createConnection({uri:Deno.env.get(`EFFECTONCE_${kind.toUpperCase()}_URL`),multipleStatements:true});try{console.log(JSON.stringify((await c.query(sql))[0]));}finally{await c.end();}}
