"""Reading requests: uploads, query parameters, disconnects, and the request context."""
