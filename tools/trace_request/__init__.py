"""`python -m tools.trace_request`: the way of one streamed chat request, counted from a real trace."""
