"""The HTTP service: trained teams answer over the network.

Parts, from the wire inwards: `launch` (the command), `app` (routes), `guard` (keys, sizes, metrics), `wire` (what goes
over the line), `sessions` and `session` (running episodes), `team` (a run as sessions need it), `shared_model` (one
model for many threads), `engine` (a vLLM server that is started again when it dies), `openai_routes` (agents as models
of the OpenAI-compatible API), `client` (a team that is somewhere else, as a policy).

Nothing here is imported by the rest of the package; `app`, `guard` and `launch` need the extra `serve`.
"""
