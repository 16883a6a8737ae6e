"""An MCP server over stdio with one tool, for agent.py: how many of a part are in stock."""

from mcp.server.fastmcp import FastMCP

server = FastMCP("shop", log_level="ERROR")


@server.tool(description="How many of a part are in stock.")
def count_parts(part: int) -> str:
    """A stock of made-up numbers, the same each time."""
    return str(part * 7919 % 500)


if __name__ == "__main__":
    server.run()
