"""The HTTP API: routes, middleware and responses. The only package that imports the web framework, Starlette."""
