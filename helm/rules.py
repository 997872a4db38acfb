"""What must hold of the chart and of the Dockerfile, and the values the chart is rendered with to see it.

Run by helm/check; needs the packages of its virtual environment.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

import jsonschema
import kubernetes_validate
import yaml

ROOT = Path(__file__).resolve().parents[1]
CHART = ROOT / "helm/trustgate"


# --- What is rendered, and what must be refused -----------------------------------------------------------------------


def values(name):
    return ["--values", CHART / f"ci/{name}-values.yaml"]


def sets(*settings):
    return [word for setting in settings for word in ("--set", setting)]


def secret(name):
    return f"secrets.{name}.name=some", f"secrets.{name}.key=some"


POSTGRES = "config.store.url=postgres://serve@db/trustgate"

# Name, arguments of helm, kinds expected besides ConfigMap, Deployment and Service.
RENDERINGS = [
    ("sqlite", values("sqlite"), {"ServiceAccount", "PersistentVolumeClaim"}),
    ("sqlite-own-claim", sets("persistence.existingClaim=mine", *secret("pepper"), "podSecurityContext.runAsUser=null",
                              "config.redis.url=redis://redis:6379/0"), {"ServiceAccount"}),
    ("postgres", values("postgres"), {"ServiceAccount", "Job", "PodDisruptionBudget"}),
    ("postgres-one-replica", sets(*secret("storeUrl"), "serviceAccount.create=false", "networkPolicy.enabled=true"),
     {"Job", "NetworkPolicy"}),
    ("postgres-not-our-table", sets(POSTGRES, "config.store.preset=trust-table", "migrate.enabled=false", "replicas=2",
                                    "config.redis.url={redis://a,redis://b}", "config.redis.cluster=true"),
     {"ServiceAccount", "PodDisruptionBudget"}),
    ("attached", values("attached"), {"ServiceAccount", "Job", "PodDisruptionBudget"}),
    ("everything", values("everything"), {"ServiceAccount", "Job", "NetworkPolicy", "PodDisruptionBudget"}),
]

# What is wrong, the values, and what the message has to say.
REFUSED = [
    ("two replicas on SQLite", sets("replicas=2"), r"replicas is 2, but the embedded SQLite .* set replicas to 1, or "),
    ("a SQLite url", sets("config.store.url=sqlite:///db"), r"config\.store\.url names a SQLite file"),
    ("a password in the store's url", sets("config.store.url=postgres://u:hush@db/x"), r"secrets\.storePassword"),
    ("a password parameter", sets("config.store.url=postgres://db/x?password=hush"), r"secrets\.storePassword"),
    ("a password in redis's url", sets("config.redis.url=redis://:hush@redis"), r"secrets\.redisPassword"),
    ("one in one of several", sets("config.redis.url={redis://a,redis://:hush@b}"), r"secrets\.redisPassword"),
    ("two store urls", sets(POSTGRES, *secret("storeUrl")), r"keep one"),
    ("two redis urls", sets("config.redis.url=redis://redis", *secret("redisUrl")), r"keep one"),
    ("a management url for SQLite", sets(*secret("storeManagementUrl")), r"storeManagementUrl is set, but no Postgre"),
    ("a redis password without redis", sets(*secret("redisPassword")), r"redisPassword is set, but no Redis"),
    ("a Sentinel's without redis", sets(*secret("redisSentinelPassword")), r"redisSentinelPassword is set, but no Redis"),
    ("old peppers without a new one", sets(*secret("previousPeppers[0]")), r"without secrets\.pepper"),
    ("a secret without its key", sets("secrets.pepper.name=some"), r"key"),
    ("a password as a setting", sets("config.store.password=hush"), r"password"),
    ("a pepper as a setting", sets("config.credential.pepper=hush"), r"pepper"),
    ("a listener as a setting", sets("config.grpc.listen=x"), r"grpc"),
    ("a misspelt value", sets("replica=1"), r"replica"),
    ("a misspelt setting", sets("config.cache.sise=1MiB"), r"sise"),
    ("a duration without its unit", sets("config.freshness.ttl=60"), r"ttl"),
    ("a size without its unit", sets("config.cache.size=1000"), r"size"),
    ("root", sets("podSecurityContext.runAsUser=0"), r"runAsUser"),
    ("runAsNonRoot switched off", sets("podSecurityContext.runAsNonRoot=false"), r"runAsNonRoot"),
]


# --- The order of things ----------------------------------------------------------------------------------------------


def check(helm, trustgate):
    """Makes every check and prints its outcome. The exit code."""
    tally = Tally()
    claim = Claims(tally)
    for name in ("sqlite", "postgres", "attached", "everything"):
        code, output = helm("lint", "--strict", CHART, *values(name))
        claim(f"helm lint: ci/{name}-values.yaml", code == 0, output)
    claim.look("the chart's files", check_chart)
    for name, arguments, kinds in RENDERINGS:
        print()
        Claims(tally, f"{name}: ").look("the rendering", check_rendering, name, arguments, kinds, helm, trustgate)
    print()
    for wrong, arguments, message in REFUSED:
        code, output = helm("template", "edge", CHART, *arguments)
        claim(f"refused: {wrong}", code != 0 and re.search(message, output), output)
    print()
    claim.look("pairs of renderings", check_pairs, helm)
    Claims(tally, "notes: ").look("the notes", check_notes, helm)
    print()
    Claims(tally, "image: ").look("the image", check_image)
    print(f"\n{tally.passed} passed, {tally.failed} failed")
    return 1 if tally.failed else 0


class Tally:
    passed = failed = 0


class Claims:
    """Prints claims under a common prefix and counts them."""

    def __init__(self, tally, prefix=""):
        self.tally, self.prefix = tally, prefix

    def __call__(self, what, holds, detail=""):
        if holds:
            self.tally.passed += 1
            print(f"ok    {self.prefix}{what}")
        else:
            self.tally.failed += 1
            print(f"FAIL  {self.prefix}{what}" + (f": {detail}" if detail != "" else ""))

    def same(self, what, found, wanted):
        self(what, found == wanted, f"found {found}, wanted {wanted}")

    def look(self, what, check, *arguments):
        """Runs a group of checks. Manifests of an unforeseen shape are a failure too, and no reason to stop."""
        try:
            check(*arguments, self)
        except Exception as error:  # noqa: BLE001
            self(f"{what} could be looked at", False, repr(error))


class Rendering:
    """The manifests of one rendering by kind, and the parts of them that most checks are about."""

    def __init__(self, name, text):
        self.name, self.text = name, text
        self.manifests = [manifest for manifest in yaml.safe_load_all(text) if manifest]
        self.kinds = {manifest["kind"]: manifest for manifest in self.manifests}
        assert len(self.kinds) == len(self.manifests), "two manifests of one kind"
        kinds = [kind for kind in ("Deployment", "Job") if kind in self.kinds]
        self.templates = {kind: self.kinds[kind]["spec"]["template"] for kind in kinds}
        self.toml_text = self.kinds["ConfigMap"]["data"]["trustgate.toml"]
        self.toml = tomllib.loads(self.toml_text)

    def pod(self, kind):
        return self.templates[kind]["spec"]

    def container(self, kind):
        (container,) = self.pod(kind)["containers"]
        return container

    def env(self, kind):
        return {entry["name"]: entry["value"] for entry in self.container(kind).get("env", [])}

    def volumes(self, kind):
        return {volume["name"]: volume for volume in self.pod(kind).get("volumes", [])}

    def mounts(self, kind):
        return {mount["mountPath"]: mount for mount in self.container(kind).get("volumeMounts", [])}

    def secret_files(self, kind):
        """Path in the container -> key of the Secret."""
        return {
            f"{path}/{item['path']}": item["key"]
            for path, mount in self.mounts(kind).items()
            for source in self.volumes(kind)[mount["name"]].get("projected", {}).get("sources", [])
            for item in source["secret"]["items"]
        }


# --- One rendering ----------------------------------------------------------------------------------------------------


def check_rendering(name, arguments, kinds, helm, trustgate, claim):
    rendering = Rendering(name, helm.render(*arguments))
    kinds = sorted(kinds | {"ConfigMap", "Deployment", "Service"})
    claim.same(f"renders {', '.join(kinds)}", sorted(rendering.kinds), kinds)
    check_schemas(rendering, claim)
    for kind in rendering.templates:
        check_pod_security(kind, rendering, claim)
        check_secret_files(kind, rendering, claim)
    check_secrets(rendering, claim)
    check_server(rendering, claim)
    check_life_cycle(rendering, claim)
    check_network(rendering, claim)
    if name.startswith("sqlite"):
        check_sqlite(rendering, claim)
    else:
        check_postgres(rendering, claim)
    if "Job" in rendering.kinds:
        check_migration(rendering, claim)
    if trustgate:
        for kind in rendering.templates:
            check_configuration(kind, rendering, trustgate, claim)


def check_configuration(kind, rendering, trustgate, claim):
    """The server itself reads the file and the variables, of which the Job has the latter alone; the Secrets are files of a
    directory that stands in for theirs."""
    with tempfile.TemporaryDirectory() as directory:
        def here(text):
            for path in re.findall(r"/run/secrets/trustgate/[\w.-]+", text):
                (Path(directory) / Path(path).name).write_text("0" * 64)
            return text.replace("/run/secrets/trustgate", directory)

        file = Path(directory) / "trustgate.toml"
        file.write_text("" if kind == "Job" else here(rendering.toml_text))
        env = {name: here(value) for name, value in rendering.env(kind).items() if name != "TRUSTGATE_CONFIG"}
        done = subprocess.run([trustgate, "--config", file, "config", "check"], env=env, capture_output=True, text=True)
    claim(f"{kind}: the server takes the configuration", done.returncode == 0, done.stdout + done.stderr)


def check_schemas(rendering, claim):
    oldest = re.search(r'kubeVersion: ">=(\d+\.\d+)', (CHART / "Chart.yaml").read_text())[1]
    newest = ".".join(kubernetes_validate.latest_version().split(".")[:2])
    for version in (oldest, newest):
        wrong = []
        for manifest in rendering.manifests:
            try:
                used = kubernetes_validate.validate(manifest, version, strict=True)
                # Where the library has no schemas of a version, it takes older ones without a word.
                if used != version:
                    wrong.append(f"validated against Kubernetes {used}")
            except (kubernetes_validate.ValidationError, kubernetes_validate.SchemaNotFoundError) as error:
                wrong.append(f"{manifest['kind']}: {error.message}")
        claim(f"every manifest is valid in Kubernetes {version}", not wrong, "; ".join(wrong))


def check_pod_security(kind, rendering, claim):
    """The "restricted" pod security standard, and what we demand beyond it."""
    pod, container, context = rendering.pod(kind), rendering.container(kind), rendering.pod(kind)["securityContext"]
    claim(f"{kind}: pod runs as non-root under the runtime's seccomp profile",
          context.get("runAsNonRoot") is True and context.get("runAsUser") != 0
          and context.get("seccompProfile") == {"type": "RuntimeDefault"}, context)
    claim.same(f"{kind}: container gains no privilege, has no capability, writes to no root file system",
               container.get("securityContext"), {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True,
                                                  "capabilities": {"drop": ["ALL"]}})
    forbidden = [name for name in ("hostNetwork", "hostPID", "hostIPC", "initContainers") if pod.get(name)]
    harmless = {"name", "configMap", "projected", "persistentVolumeClaim", "emptyDir"}
    forbidden += [volume for volume in pod.get("volumes", []) if not set(volume) <= harmless]
    claim(f"{kind}: nothing of the host, no other container", not forbidden, forbidden)
    claim(f"{kind}: no service account token", pod.get("automountServiceAccountToken") is False)
    claim(f"{kind}: no service links in the environment", pod.get("enableServiceLinks") is False)
    claim(f"{kind}: a memory limit", container["resources"]["limits"].get("memory"))
    mounted = sorted(mount["name"] for mount in container.get("volumeMounts", []))
    claim.same(f"{kind}: every volume is mounted", mounted, sorted(rendering.volumes(kind)))


def check_secret_files(kind, rendering, claim):
    if kind == "Deployment":
        settings = [item for section in rendering.toml.values() for item in section.items()]
    else:
        settings = [(name.lower(), value) for name, value in rendering.env(kind).items()]
    named = [value for name, value in settings if name.endswith("_file")]
    named += [path for name, paths in settings if name.endswith("_files") for path in paths]
    # The CA of the store has no setting: the store's url names the file.
    mounted = [path for path in rendering.secret_files(kind) if not path.endswith("/store-ca.crt")]
    claim.same(f"{kind}: the secret files mounted are those that settings name", sorted(mounted), sorted(named))
    modes = {volume["projected"]["defaultMode"] for volume in rendering.volumes(kind).values() if "projected" in volume}
    claim(f"{kind}: secret files are for the owner and the pod's group alone", modes <= {0o440}, modes)


def check_secrets(rendering, claim):
    claim("the chart makes no Secret", "Secret" not in rendering.kinds)
    settings = [name for section in rendering.toml.values() for name in section]
    settings += [name.lower() for kind in rendering.templates for name in rendering.env(kind)]
    secrets = [name for name in settings if re.search("(password|pepper|mac_key|management_url)$", name)]
    claim("no secret setting in the ConfigMap or the environment", not secrets, secrets)
    claim("no url with a password", not re.search(r"://[^/\s@]*:[^/\s@]*@|password=", rendering.text))
    inside = any(path.endswith("/store-management-url") for path in rendering.secret_files("Deployment"))
    claim.same("the management url is in the server pods only where asked for", inside, rendering.name == "everything")


def check_server(rendering, claim):
    container, env = rendering.container("Deployment"), rendering.env("Deployment")
    host = "[::]" if rendering.name == "everything" else "0.0.0.0"
    claim.same(f"listens on {host}", (env.get("TRUSTGATE__GRPC__LISTEN"), env.get("TRUSTGATE__ADMIN__LISTEN")),
               (f"{host}:50051", f"{host}:9180"))
    claim("no listener in the configuration file", not rendering.toml.keys() & {"grpc", "admin", "api"})
    claim.same("runs `serve`", (container.get("command"), container["args"]), (None, ["serve"]))
    claim(f"the image is a release or a digest: {container['image']}",
          re.search(r"(:\d+\.\d+\.\d+|@sha256:[0-9a-f]{64})$", container["image"]))
    directory, _, file = env["TRUSTGATE_CONFIG"].rpartition("/")
    mount = rendering.mounts("Deployment")[directory]
    volume = rendering.volumes("Deployment")[mount["name"]]
    config = rendering.kinds["ConfigMap"]
    claim("reads the ConfigMap, mounted whole", volume.get("configMap") == {"name": config["metadata"]["name"]}
          and file in config["data"] and "subPath" not in mount, (mount, volume))
    annotations = rendering.templates["Deployment"]["metadata"]["annotations"]
    claim("pods carry a checksum of the configuration", re.fullmatch("[0-9a-f]{64}", annotations["checksum/config"]))
    limit = size(container["resources"]["limits"]["memory"])
    cache = size(rendering.toml.get("cache", {}).get("size", "128MiB"))
    claim("the cache takes at most half the memory limit", cache * 2 <= limit, (cache, limit))


def check_life_cycle(rendering, claim):
    pod, container = rendering.pod("Deployment"), rendering.container("Deployment")
    for probe, path in (("startupProbe", "/livez"), ("livenessProbe", "/livez"), ("readinessProbe", "/readyz")):
        claim.same(f"{probe} asks {path}", container.get(probe, {}).get("httpGet"), {"path": path, "port": "admin"})
    drain = sum(milliseconds(rendering.toml["limits"][name]) for name in ("drain_delay", "drain_grace"))
    spare = pod["terminationGracePeriodSeconds"] * 1000 - drain
    claim("the drain ends before the kubelet kills, but not long before", 3_000 <= spare < 10_000, f"{spare} ms left")
    several = rendering.kinds["Deployment"]["spec"]["replicas"] > 1
    claim.same("a disruption budget where replicas are several", "PodDisruptionBudget" in rendering.kinds, several)
    claim.same("replicas are spread where there are several", bool(pod.get("topologySpreadConstraints")), several)


def check_network(rendering, claim):
    ports = {port["name"]: port["containerPort"] for port in rendering.container("Deployment")["ports"]}
    claim.same("container ports", ports, {"grpc": 50051, "admin": 9180})
    grpc, metrics = rendering.kinds["Service"]["spec"]["ports"]
    claim.same("Service port grpc is HTTP/2 in the clear", grpc,
               {"name": "grpc", "port": 50051, "targetPort": "grpc", "appProtocol": "kubernetes.io/h2c"})
    claim.same("Service port metrics is the admin listener", metrics,
               {"name": "metrics", "port": 9180, "targetPort": "admin"})

    selector = rendering.kinds["Deployment"]["spec"]["selector"]["matchLabels"]
    for kind, template in rendering.templates.items():
        chosen = selector.items() <= template["metadata"]["labels"].items()
        claim.same(f"{kind}: pods are asked for decisions: {kind == 'Deployment'}", chosen, kind == "Deployment")
    claim.same("the Service selects the server pods", rendering.kinds["Service"]["spec"]["selector"], selector)
    if budget := rendering.kinds.get("PodDisruptionBudget"):
        claim.same("the disruption budget is about them", budget["spec"]["selector"]["matchLabels"], selector)
    if policy := rendering.kinds.get("NetworkPolicy"):
        claim.same("the network policy is about them", policy["spec"]["podSelector"]["matchLabels"], selector)
        rules = policy["spec"]["ingress"]
        named = [rule for rule in rules if rule["from"] and rule["ports"] in ([{"port": "grpc"}], [{"port": "admin"}])]
        claim("the network policy opens known ports to named sources", rules and named == rules, rules)


def check_sqlite(rendering, claim):
    spec = rendering.kinds["Deployment"]["spec"]
    claim.same("one replica, replaced by Recreate", (spec["replicas"], spec["strategy"]), (1, {"type": "Recreate"}))
    mounts, volumes = rendering.mounts("Deployment"), rendering.volumes("Deployment")
    directory, _, file = rendering.toml["store"]["url"].removeprefix("sqlite://").rpartition("/")
    state = volumes[mounts[directory]["name"]]["persistentVolumeClaim"]["claimName"]
    writable = not mounts[directory].get("readOnly")
    claim("the database is on a volume to be written to", file == "trustgate.db" and writable)
    if own := rendering.kinds.get("PersistentVolumeClaim"):
        claim.same("the volume is the chart's claim", state, own["metadata"]["name"])
        claim.same("the claim outlives the release", own["metadata"]["annotations"]["helm.sh/resource-policy"], "keep")
        claim.same("the claim is for one node at a time", own["spec"]["accessModes"], ["ReadWriteOnce"])
    else:
        claim.same("the volume is the claim that was named", state, "mine")
    context = rendering.pod("Deployment")["securityContext"]
    claim("the volume's group may write, and files keep their mode",
          context.get("fsGroup") and context.get("fsGroupChangePolicy") == "OnRootMismatch", context)
    claim("/tmp can be written to", "emptyDir" in volumes[mounts["/tmp"]["name"]])


def check_postgres(rendering, claim):
    claim.same("never fewer pods than replicas", rendering.kinds["Deployment"]["spec"]["strategy"],
               {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}})
    kinds = {kind for volume in rendering.volumes("Deployment").values() for kind in volume if kind != "name"}
    claim("nothing on a disk", kinds <= {"configMap", "projected"}, kinds)


def check_migration(rendering, claim):
    hook = {name: value for name, value in rendering.kinds["Job"]["metadata"]["annotations"].items() if "hook" in name}
    claim.same("the Job comes before install and upgrade, and stays if it failed", hook,
               {"helm.sh/hook": "pre-install,pre-upgrade",
                "helm.sh/hook-delete-policy": "before-hook-creation,hook-succeeded"})
    container = rendering.container("Job")
    claim.same("the Job runs `migrate` from the server's image",
               (container.get("command"), container["args"], container["image"]),
               (None, ["migrate"], rendering.container("Deployment")["image"]))
    # Hooks come before everything else of a first install.
    own = [name for name in ("serviceAccount", "configMap") if name in str(rendering.pod("Job"))]
    claim("the Job needs nothing of the release", not own, own)
    env = {name: value for name, value in rendering.env("Job").items() if name.startswith("TRUSTGATE__STORE__")}
    management = env.pop("TRUSTGATE__STORE__MANAGEMENT_URL_FILE", None)
    store = {name: value for name, value in rendering.toml["store"].items() if name != "management_url_file"}
    text = {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in store.items()}
    claim.same("the Job means the server's database", env,
               {f"TRUSTGATE__STORE__{name.upper()}": value for name, value in text.items()})
    claim.same("the Job has the management url where one is given", rendering.secret_files("Job").get(management),
               None if rendering.name == "postgres-one-replica" else "management-url")


# --- Several renderings, and the chart's own files --------------------------------------------------------------------


def check_pairs(helm, claim):
    """What shows only when two renderings are compared, or values with what became of them."""

    def checksum(*arguments):
        return re.search("checksum/config: ([0-9a-f]+)", helm.render(*sets(*arguments)))[1]

    claim("the checksum follows the configuration", checksum() != checksum("config.log.level=debug"))
    claim("the checksum follows an added secret", checksum() != checksum(*secret("pepper")))
    claim("the checksum follows nothing else", checksum() == checksum("image.tag=2.0.0", "replicas=0"))
    for name in ("postgres", "attached", "everything"):
        given = yaml.safe_load((CHART / f"ci/{name}-values.yaml").read_text())["config"]
        config = Rendering(name, helm.render(*values(name))).toml
        # repr, because 8 and 8.0 are the same to Python and not to TOML.
        lost = [f"{section}.{setting}" for section, settings in given.items() for setting, value in settings.items()
                if repr(config.get(section, {}).get(setting)) != repr(value)]
        claim(f"every setting of ci/{name}-values.yaml arrives as it was given", not lost, lost)

    def policy(**settings):
        given = json.dumps({"enabled": True, **settings})
        return Rendering("", helm.render("--set-json", f"networkPolicy={given}")).kinds["NetworkPolicy"]["spec"]

    claim.same("a network policy without sources lets nobody in", policy(grpcFrom=[])["ingress"], [])
    claim.same("a network policy restricts nothing outwards by itself", policy()["policyTypes"], ["Ingress"])
    shut = policy(egress=[])
    claim("one without egress rules lets nothing out", "Egress" in shut["policyTypes"] and not shut.get("egress"), shut)
    long = Rendering("", helm.render(*values("postgres"), *sets(f"fullnameOverride={'long-' * 20}")))
    names = [manifest["metadata"]["name"] for manifest in long.manifests]
    label = "[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
    claim("names stay DNS labels", all(re.fullmatch(label, name) for name in names), names)


def check_notes(helm, claim):
    def notes(*arguments):
        code, output = helm("install", "edge", CHART, "--namespace", "auth", "--dry-run=client", *arguments)
        assert code == 0, output
        return output.partition("\nNOTES:\n")[2]

    text = notes()
    for command in ("trust create acme", "key issue --trust acme"):
        line = f"kubectl -n auth exec deploy/edge-trustgate -- trustgate {command}\n"
        claim(f"how to run `{command}`", line in text, text)
    envoy = yaml.safe_load(re.search(r"^ +http_filters:.*?(?=^   \S)", text, re.DOTALL | re.MULTILINE)[0])
    filter, cluster = envoy["http_filters"][0]["typed_config"], envoy["clusters"][0]
    claim.same("Envoy's filter fails closed", filter["failure_mode_allow"], False)
    claim.same("Envoy's filter asks the cluster", filter["grpc_service"]["envoy_grpc"]["cluster_name"], cluster["name"])
    (endpoint,) = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"]
    claim.same("Envoy's cluster is the Service", endpoint["endpoint"]["address"]["socket_address"],
               {"address": "edge-trustgate.auth.svc.cluster.local", "port_value": 50051})
    text = notes(*values("postgres"))
    elsewhere = "     trustgate trust create acme\n" in text and " exec " not in text
    claim("no kubectl exec where the pods cannot manage", elsewhere, text)
    text = notes(*values("attached"))
    claim("no key is issued in a table of somebody else's", " issue" not in text and "exec -i deploy" in text, text)


def check_chart(claim):
    """The chart's own files against each other and against the crate."""
    schema = json.loads((CHART / "values.schema.json").read_text())
    jsonschema.Draft7Validator.check_schema(schema)
    known = schema["properties"]
    # `global` is what Helm hands to every subchart; supplementalGroups is the one value without a default.
    names = {name: set(value.get("properties", [])) - {"supplementalGroups"} for name, value in known.items()}
    del names["global"]
    defaults = yaml.safe_load((CHART / "values.yaml").read_text())
    claim.same("values.yaml and its schema name the same values", set(defaults), set(names))
    for name, parts in sorted(names.items()):
        if parts and name != "config":
            claim.same(f"values.yaml and its schema name the same values in {name}", set(defaults[name]), parts)
    readme = (CHART / "README.md").read_text()
    missing = [name for name in names if not re.search(rf"^\|.*`{name}\b", readme, re.MULTILINE)]
    claim("README.md explains every value", not missing, missing)

    postgres, attached, everything = [
        yaml.safe_load((CHART / f"ci/{name}-values.yaml").read_text()) for name in ("postgres", "attached", "everything")
    ]
    claim.same("ci/everything-values.yaml tries every value", set(everything), set(names))
    claim.same("ci/everything-values.yaml tries every secret", set(everything["secrets"]), names["secrets"])
    sections = known["config"]["properties"]
    settings = {(section, name) for section in sections for name in sections[section]["properties"]}
    configs = postgres["config"], attached["config"], everything["config"]
    tried = {(section, name) for config in configs for section in config for name in config[section]}
    # The preset has a rendering of its own.
    claim.same("ci/ tries every setting", tried | {("store", "preset")}, settings)
    crate = tomllib.loads((ROOT / "Cargo.toml").read_text())["package"]["version"]
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    claim.same("appVersion is the crate's version", chart["appVersion"], crate)


# --- The image --------------------------------------------------------------------------------------------------------


def check_image(claim):
    """The Dockerfile, as far as it can be judged without building it."""
    hadolint = [Path(sys.prefix) / "bin/hadolint", "--no-color", ROOT / "Dockerfile"]
    done = subprocess.run(hadolint, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    claim("hadolint has nothing to say", done.returncode == 0 and not done.stdout, done.stdout)

    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    text = re.sub(r" +", " ", "\n".join(lines).replace("\\\n", " "))
    build, final = [stage for stage in re.split("^(?=FROM )", text, flags=re.MULTILINE) if stage.strip()]
    manifest = tomllib.loads((ROOT / "Cargo.toml").read_text())
    rust = manifest["package"]["rust-version"]
    claim.same(f"built with Rust {rust}, on the Debian it will run on", (build.splitlines()[0], final.splitlines()[0]),
               (f"FROM rust:{rust}-slim-bookworm AS build", "FROM gcr.io/distroless/cc-debian12:nonroot"))
    claim("built from the lock file", " cargo build --release --locked " in build)
    claim("the commit is known when it is built", "\nARG TRUSTGATE_COMMIT" in build.partition("cargo build")[0])
    env = re.search("^ENV (.*)$", final, re.MULTILINE)[1].split()
    for setting in ("TRUSTGATE__GRPC__LISTEN=0.0.0.0:50051", "TRUSTGATE__ADMIN__LISTEN=0.0.0.0:9180",
                    "STATE_DIRECTORY=/var/lib/trustgate"):
        claim(setting, setting in env, env)
    claim("not root, in numbers", "\nUSER 65532:65532\n" in final)
    # On the PATH, for `kubectl exec ... trustgate`.
    for line in ("COPY --from=build /out/trustgate /usr/local/bin/trustgate", 'ENTRYPOINT ["/usr/local/bin/trustgate"]',
                 'CMD ["serve"]'):
        claim(line, line in final.splitlines())

    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    first, *sent = [line for line in ignore if line and not line.startswith("#")]
    claim("the build context is an allow-list", first == "*" and all(line.startswith("!") for line in sent), ignore)
    needed = {"Cargo.toml", "Cargo.lock", "src"} | files_the_build_reads(manifest)
    missing = needed - {line.removeprefix("!") for line in sent}
    claim("the build context holds all that the build reads", not missing, missing)


def files_the_build_reads(manifest):
    """Top-level names that the manifest's targets and the sources' `include_str!` and the like point to."""
    targets = [target for kind in ("bin", "test", "bench", "example") for target in manifest.get(kind, [])]
    paths = [ROOT / target["path"] for target in targets if "path" in target]
    paths += [path for path in [ROOT / "build.rs"] if path.exists()]
    for source in (ROOT / "src").rglob("*.rs"):
        # Up to the tests, which stand last in a file and are not built into the image.
        code = source.read_text().partition("#[cfg(test)]\nmod ")[0]
        paths += [source.parent / name for name in re.findall(r'include(?:_str|_bytes)?!\(\s*"([^"]+)"', code)]
        paths += [ROOT / name.lstrip("/") for name in re.findall(r'env!\("CARGO_MANIFEST_DIR"\),\s*"([^"]+)"', code)]
    return {Path(os.path.normpath(path)).relative_to(ROOT).parts[0] for path in paths}


def milliseconds(text):
    number, unit = re.fullmatch(r"(\d+)([a-z]+)", text).groups()
    return int(number) * {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000}[unit]


def size(text):
    number, unit = re.fullmatch(r"(\d+)([A-Za-z]+)", text).groups()
    return int(number) << {"B": 0, "K": 10, "M": 20, "G": 30}[unit[0]]
