"""How fast are the engines: steps, prefill, memory and start-up, with the plugin and without?"""
