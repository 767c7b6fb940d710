"""Engine replicas on other processes or machines behind one server: routing, and jobs over TCP."""
