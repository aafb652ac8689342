"""The embedded Hub: a server on the loopback interface, for demos, tests and rehearsals."""
