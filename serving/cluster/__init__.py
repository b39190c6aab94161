"""The cluster's parts. Built: the metadata store (`key_value_store.py`) and elections in it (`election.py`)."""
