"""The device mesh, the table of layouts, and every manual collective of longctx."""
