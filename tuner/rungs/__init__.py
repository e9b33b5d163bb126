"""The fidelities a trial can be trained at; each takes a ticket and gives a result."""
