"""Between the socket and the application: who may connect, how long each part of a request may take, when to stop."""
