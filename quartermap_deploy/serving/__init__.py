"""Serving a bundle to clients, by the Open Inference Protocol (KServe v2) over HTTP and gRPC.

    options.py        how to serve
    server.py         starting, being ready, stopping
    startup.py        opening sessions, and proving them on the golden inputs
    state.py          what the server is about, and the requests it has taken on
    http_api.py       the protocol over HTTP, /metrics, uploads and the page
    http_codec.py     requests and answers as JSON with binary tensors behind
    grpc_api.py       the protocol over gRPC
    grpc_codec.py     requests and answers as messages
    grpc_messages.py  the messages
    requests.py       a request, whichever way it came
    tensors.py        element types, and tensors as bytes and as JSON
    models.py         what is served: the model itself, and the one that takes image files
    callers.py        whose requests are answered: names of the server, and pages of other sites
    forms.py          forms with files, as they come
    pace.py           how fast uploads come in
    bodies.py         how much of requests is in memory
    arrivals.py       requests on their way, which give way to others
    wire.py           what a message of gRPC would take, before it is parsed
    pixel_data.py     what pixels come from in an image file, without all the rest
    images.py         decoding image files that strangers sent
    decoders.py       the threads that do it, small ones first
    answers.py        what goes back for an uploaded file
    batcher.py        putting requests together into batches
    statistics.py     counters, for the protocol, for Prometheus and for the page
    page.py           the page at /
    logs.py           one line of JSON for each event
    memory.py         large blocks, given back as soon as they are free

Nothing here imports torch. The event loop reads and writes; batches run in threads of their own.
"""

from __future__ import annotations
