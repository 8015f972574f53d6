"""How strong a finding can clean twins look? The audit's limit of strength comes from here."""
