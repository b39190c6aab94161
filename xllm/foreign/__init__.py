"""The flags of other engines' servers: which of them xLLM takes, and what it says to the rest."""
