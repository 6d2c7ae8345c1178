"""
What a client may ask in OpenAI's chat API, read strictly: what is not understood is refused.

https://platform.openai.com/docs/api-reference/chat
"""
import base64
import json

from parts.files import NAMES_OF_TYPES

NUMBERS = {              # that a request may name, and their ranges
    "temperature": (0.0, 2.0),
    "top_p": (0.0, 1.0),
    "max_tokens": (1, 2 ** 31),
    "max_completion_tokens": (1, 2 ** 31),
    "seed": (-2 ** 63, 2 ** 63 - 1),
}
OTHERS = {               # the type of whatever else it may name
    "stream": bool,
    "stream_options": dict,
    "stop": str | list,
    "messages": list,
    "model": str,
    "user": str,
}
NOTHING = (None, False, 0, "", [], {})   # what asks for nothing, under any name
NEUTRAL = {              # what asks for nothing, under names of this API and of what others add
    "n": (1,),
    "top_k": (-1, 0),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
    "reasoning_effort": ("none",),
    "best_of": (1,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "typical_p": (1,),
    "do_sample": (True,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "add_generation_prompt": (True,),
}
MAX_STOPS = 16           # of a request, each
MAX_STOP = 256           # characters long: they are looked for at every token


class Refusal(Exception):
    """What a client is told instead of an answer: a status, and an error in the API's form."""

    def __init__(self, message, code=None, status=400):
        super().__init__(message)
        self.status = status
        kind = "invalid_request_error" if status < 500 else "server_error"
        if status == 429:
            kind = "rate_limit_error"
        self.json = {"error": {"message": message, "type": kind, "param": None, "code": code}}


def object_of(data):
    """The JSON object that a request's bytes hold."""
    try:
        value = json.loads(data)
        json.dumps(value, ensure_ascii=False).encode()   # not with half a surrogate pair
    except (ValueError, RecursionError) as error:
        raise Refusal(f"the request is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise Refusal("the request is not a JSON object")
    return value


def answer_of(body):
    """The answer that a request for attention holds, taken out: the chat API does not know it."""
    answer = body.pop("answer", None)
    if not isinstance(answer, str) or not answer.strip():
        raise Refusal("answer is not the text of an answer")
    return answer


def brief(value):
    """A value that was sent, in a message. What is nested may be nested too deeply to be shown."""
    if isinstance(value, dict | list):
        return NAMES_OF_TYPES[type(value)]
    return f"{value!r:.80}"


def check_names(sent, known, where):
    """Raises Refusal for a name that is not known, unless its value asks for nothing."""
    for name, value in sent.items():
        if name not in known and value is not None and value not in NEUTRAL.get(name, NOTHING):
            raise Refusal(f"{where}{brief(name)} is not supported, here with {brief(value)}; taken "
                          f"are {', '.join(sorted(known))}")


def conversation_of(messages):
    """The API's messages as [(text, [address of each picture]), ...], user and assistant by turns.

    Pictures stand before the words of their turn, as in training.
    """
    if not isinstance(messages, list) or len(messages) % 2 == 0:
        raise Refusal("messages is no list that begins and ends with one of the user, and "
                      "alternates user, assistant")
    turns = []
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        role = message.get("role") if isinstance(message, dict) else None
        expected = ("user", "assistant")[i % 2]
        if role != expected:
            raise Refusal(f"{where} is from {brief(role)} where {expected!r} belongs; the system "
                          "message of this model is part of its template")
        check_names(message, {"role", "content", "name"}, f"{where}: ")
        turns.append(parts_of(message.get("content"), role, where))
    return turns


def parts_of(content, role, where):
    """(text, [address of each picture]) of one message, whose content is a text or parts."""
    texts, urls = [], []
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    for part in content if isinstance(content, list) else [None]:
        match part:
            case {"type": "text", "text": str(text)}:
                texts.append(text)
            case {"type": "image_url", "image_url": {"url": str(url)} | str(url)} if role == "user":
                urls.append(url)
            case _:
                raise Refusal(f"{where}.content is neither text nor a list of text parts and, from "
                              "a user, image_url parts")
    return "\n".join(texts), urls


def check_options(body):
    """Raises Refusal unless what a request names is known, of its type and in range."""
    check_names(body, NUMBERS.keys() | OTHERS, "")
    for name, kind in OTHERS.items():
        if not isinstance(body.get(name), kind | None):
            raise Refusal(f"{name} {brief(body[name])} is not of the API's type")
    for name, (low, high) in NUMBERS.items():
        value = body.get(name)
        kinds = {int, type(low)}         # but no bool, which is an int to isinstance
        if value is not None and (type(value) not in kinds or not low <= value <= high):
            raise Refusal(f"{name} {brief(value)}: it is a number from {low} to {high}")
    options = body.get("stream_options") or {}
    check_names(options, {"include_usage"}, "stream_options: ")
    if not isinstance(options.get("include_usage"), bool | None):
        raise Refusal("stream_options: include_usage is neither true nor false")


def sampling_of(body):
    """How a request is sampled: `stop`, a list, and of the numbers those that it names."""
    check_options(body)
    stop = body.get("stop") or []
    if isinstance(stop, str):
        stop = [stop]
    fits = all(isinstance(text, str) and 0 < len(text) <= MAX_STOP for text in stop)
    if len(stop) > MAX_STOPS or not fits:
        raise Refusal(f"stop: at most {MAX_STOPS} texts of 1 to {MAX_STOP} characters are taken")
    sampling = {
        "temperature": body.get("temperature"),
        "top_p": body.get("top_p"),
        "max_new_tokens": body.get("max_completion_tokens") or body.get("max_tokens"),
        "seed": body.get("seed"),
    }
    # 1e-40 would make infinities of logits
    named = {name: round(value, 3) for name, value in sampling.items() if value is not None}
    return named | {"stop": stop}


def picture_bytes(url, where):
    """The file that an address holds. Nothing is fetched: whose address might it be?"""
    head, _, data = url.partition(",")
    if not head.startswith("data:") or not head.endswith(";base64"):
        raise Refusal(f"{where}: send the picture itself, as a data: address with ;base64; this "
                      "server fetches none from elsewhere")
    try:
        return base64.b64decode("".join(data.split()), validate=True)    # some break its lines
    except ValueError as error:
        raise Refusal(f"{where}: what follows ;base64 is not base64") from error


# -----------------------------------------------------------------------------
# The form of an answer. `head` is the same in all that is sent for one: id, created, model


def completion(head, text, reason, usage):
    """A whole answer, and why it ended."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text},
              "finish_reason": reason, "logprobs": None}
    return head | {"object": "chat.completion", "choices": [choice], "usage": usage}


def chunk(head, delta=None, reason=None, **more):
    """The next part of a streamed answer, as a server-sent event; none of it, but `more`, if there
    is no delta."""
    choices = []
    if delta is not None:
        choices.append({"index": 0, "delta": delta, "finish_reason": reason})
    return event(head | {"object": "chat.completion.chunk", "choices": choices} | more)


def event(value):
    return f"data: {json.dumps(value)}\n\n"
