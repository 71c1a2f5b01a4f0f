"""The tenant `shop`: databases on a volume that outlives a killed container."""

from demo.shell import Shell, step

ORDERS = 2000
REDIS_PORT = "7637"
_SQL = f"""
CREATE TABLE orders (id INTEGER PRIMARY KEY, customer TEXT, cents INTEGER);
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {ORDERS})
INSERT INTO orders SELECT i, 'customer ' || (i % 97), i * 7 % 10000 FROM n;
CREATE INDEX by_customer ON orders (customer);
PRAGMA integrity_check;
SELECT count(*), sum(cents) FROM orders;
"""
_SERVER = (
    "redis-server",
    *("--bind", "127.0.0.1", "--port", REDIS_PORT, "--dir", "/data"),
    *("--appendonly", "yes", "--appendfsync", "always", "--save", ""),
)


def run_shop(shell: Shell, image: str) -> list[str]:
    step("shop: SQLite writes orders to a volume, another container reads them back")
    shell.polytropo("volume", "create", "--tenant", "shop", "orders")
    run = ("run", "--tenant", "shop", "--rm", "-v", "orders:/data")
    written = shell.polytropo(*run, "-i", image, "sqlite3", "/data/orders.db", stdin=_SQL, show=True)
    total = written.split()[-1]
    query = "SELECT count(*), sum(cents) FROM orders;"
    read = shell.polytropo(*run, image, "sqlite3", "/data/orders.db", query, show=True)
    _expect(read.strip() == total and total.startswith(f"{ORDERS}|"), "SQLite read back something else")

    step("shop: Redis acknowledges writes, its container is killed, a new one has them all")
    serve = ("run", "-d", "--tenant", "shop", "-v", "orders:/data")
    cli = ("redis-cli", "-p", REDIS_PORT)
    shell.polytropo(*serve, "--name", "redis", image, *_SERVER)
    shell.until("Redis", "exec", "redis", *cli, "ping", expected="PONG")
    script = "for i = 1, 1000 do redis.call('SET', 'order:' .. i, i * i) end return redis.call('DBSIZE')"
    shell.polytropo("exec", "redis", *cli, "eval", script, "0", show=True)
    shell.polytropo("rm", "-f", "redis")
    shell.polytropo(*serve, "--name", "redis-again", image, *_SERVER)
    shell.until("Redis", "exec", "redis-again", *cli, "ping", expected="PONG")
    size = shell.polytropo("exec", "redis-again", *cli, "dbsize", show=True).split()[-1]
    value = shell.polytropo("exec", "redis-again", *cli, "get", "order:1000", show=True).strip()
    _expect((size, value) == ("1000", "1000000"), "Redis lost writes that it had acknowledged")
    shell.polytropo("stop", "redis-again")
    return [
        f"shop  SQLite: {ORDERS} orders written in one container, read back in another",
        "shop  Redis: 1,000 acknowledged writes, container killed, all 1,000 there",
    ]


def _expect(true: bool, otherwise: str) -> None:
    if not true:
        raise SystemExit(f"demo: {otherwise}")
