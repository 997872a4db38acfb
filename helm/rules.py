"""The rules for the chart and the Dockerfile, and the values with which helm/check renders the chart.

helm/check imports this module and runs `check`. The module needs the packages of that script's virtual environment.
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


# --- Values that must render, and values that must fail ---------------------------------------------------------------


def values(name):
    return ["--values", CHART / f"ci/{name}-values.yaml"]


def sets(*settings):
    return [word for setting in settings for word in ("--set", setting)]


def secret(name):
    return f"secrets.{name}.name=some", f"secrets.{name}.key=some"


POSTGRES = "config.store.url=postgres://serve@db/trustgate"

# Name, arguments of helm, expected kinds besides ConfigMap, Deployment and Service.
RENDERINGS = [
    ("sqlite", values("sqlite"), {"ServiceAccount", "PersistentVolumeClaim"}),
    ("sqlite-existing-claim", sets("persistence.existingClaim=mine", *secret("pepper"),
                                   "podSecurityContext.runAsUser=null", "config.redis.url=redis://redis:6379/0"),
     {"ServiceAccount"}),
    ("postgres", values("postgres"), {"ServiceAccount", "Job", "PodDisruptionBudget"}),
    ("postgres-one-replica", sets(*secret("storeUrl"), "serviceAccount.create=false", "networkPolicy.enabled=true"),
     {"Job", "NetworkPolicy"}),
    ("postgres-existing-table", sets(POSTGRES, "config.store.preset=trust-table", "migrate.enabled=false",
                                     "replicas=2", "config.redis.url={redis://a,redis://b}",
                                     "config.redis.cluster=true"),
     {"ServiceAccount", "PodDisruptionBudget"}),
    ("attached", values("attached"), {"ServiceAccount", "Job", "PodDisruptionBudget"}),
    ("everything", values("everything"), {"ServiceAccount", "Job", "NetworkPolicy", "PodDisruptionBudget"}),
]

# The problem, the values, and a pattern that the error message must match.
REFUSED = [
    ("two replicas on SQLite", sets("replicas=2"), r"replicas is 2, but the embedded SQLite .* set replicas to 1, or "),
    ("a SQLite url", sets("config.store.url=sqlite:///db"), r"config\.store\.url names a SQLite file"),
    ("a password in the store's url", sets("config.store.url=postgres://u:hush@db/x"), r"secrets\.storePassword"),
    ("a password parameter", sets("config.store.url=postgres://db/x?password=hush"), r"secrets\.storePassword"),
    ("a password in redis's url", sets("config.redis.url=redis://:hush@redis"), r"secrets\.redisPassword"),
    ("a password in one of two urls", sets("config.redis.url={redis://a,redis://:hush@b}"), r"secrets\.redisPassword"),
    ("two store urls", sets(POSTGRES, *secret("storeUrl")), r"keep one"),
    ("two redis urls", sets("config.redis.url=redis://redis", *secret("redisUrl")), r"keep one"),
    ("a management url for SQLite", sets(*secret("storeManagementUrl")), r"storeManagementUrl is set, but no Postgre"),
    ("a redis password without redis", sets(*secret("redisPassword")), r"redisPassword is set, but no Redis"),
    ("a Sentinel password without redis", sets(*secret("redisSentinelPassword")),
     r"redisSentinelPassword is set, but no Redis"),
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
    ("runAsNonRoot turned off", sets("podSecurityContext.runAsNonRoot=false"), r"runAsNonRoot"),
]


# --- All checks in order ----------------------------------------------------------------------------------------------


def check(helm, trustgate):
    """Runs every check and prints its result. Returns the exit code."""
    tally = Tally()
    expect = Expectations(tally)
    for name in ("sqlite", "postgres", "attached", "everything"):
        code, output = helm("lint", "--strict", CHART, *values(name))
        expect(f"helm lint: ci/{name}-values.yaml", code == 0, output)
    expect.group("the chart's files", check_chart)
    for name, arguments, kinds in RENDERINGS:
        print()
        rendered = Expectations(tally, f"{name}: ")
        rendered.group("the rendering", check_rendering, name, arguments, kinds, helm, trustgate)
    print()
    for problem, arguments, message in REFUSED:
        code, output = helm("template", "edge", CHART, *arguments)
        expect(f"refused: {problem}", code != 0 and re.search(message, output), output)
    print()
    expect.group("pairs of renderings", check_pairs, helm)
    Expectations(tally, "notes: ").group("the notes", check_notes, helm)
    print()
    Expectations(tally, "image: ").group("the image", check_image)
    print(f"\n{tally.passed} passed, {tally.failed} failed")
    return 1 if tally.failed else 0


class Tally:
    passed = failed = 0


class Expectations:
    """Prints whether each expectation holds, with a common prefix, and counts the results."""

    def __init__(self, tally, prefix=""):
        self.tally, self.prefix = tally, prefix

    def __call__(self, name, holds, detail=""):
        if holds:
            self.tally.passed += 1
            print(f"ok    {self.prefix}{name}")
        else:
            self.tally.failed += 1
            print(f"FAIL  {self.prefix}{name}" + (f": {detail}" if detail != "" else ""))

    def same(self, name, found, wanted):
        self(name, found == wanted, f"found {found}, wanted {wanted}")

    def group(self, name, check, *arguments):
        """Runs a group of checks. An exception, such as for a manifest of unexpected shape, counts as one failure."""
        try:
            check(*arguments, self)
        except Exception as error:  # noqa: BLE001
            self(f"{name} can be checked", False, repr(error))


class Rendering:
    """The manifests of one rendering by kind, and the parts that most checks use."""

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
        """Maps the path in the container to the key of the Secret."""
        return {
            f"{path}/{item['path']}": item["key"]
            for path, mount in self.mounts(kind).items()
            for source in self.volumes(kind)[mount["name"]].get("projected", {}).get("sources", [])
            for item in source["secret"]["items"]
        }


# --- One rendering ----------------------------------------------------------------------------------------------------


def check_rendering(name, arguments, kinds, helm, trustgate, expect):
    rendering = Rendering(name, helm.render(*arguments))
    kinds = sorted(kinds | {"ConfigMap", "Deployment", "Service"})
    expect.same(f"renders {', '.join(kinds)}", sorted(rendering.kinds), kinds)
    check_schemas(rendering, expect)
    for kind in rendering.templates:
        check_pod_security(kind, rendering, expect)
        check_secret_files(kind, rendering, expect)
    check_secrets(rendering, expect)
    check_server(rendering, expect)
    check_lifecycle(rendering, expect)
    check_network(rendering, expect)
    if name.startswith("sqlite"):
        check_sqlite(rendering, expect)
    else:
        check_postgres(rendering, expect)
    if "Job" in rendering.kinds:
        check_migration(rendering, expect)
    if trustgate:
        for kind in rendering.templates:
            check_configuration(kind, rendering, trustgate, expect)


def check_configuration(kind, rendering, trustgate, expect):
    """Has the server check the file and the variables; the Job has only variables. Files in a temporary directory
    replace the mounted Secrets."""
    with tempfile.TemporaryDirectory() as directory:
        def with_files(text):
            for path in re.findall(r"/run/secrets/trustgate/[\w.-]+", text):
                (Path(directory) / Path(path).name).write_text("0" * 64)
            return text.replace("/run/secrets/trustgate", directory)

        file = Path(directory) / "trustgate.toml"
        file.write_text("" if kind == "Job" else with_files(rendering.toml_text))
        env = {name: with_files(value) for name, value in rendering.env(kind).items() if name != "TRUSTGATE_CONFIG"}
        done = subprocess.run([trustgate, "--config", file, "config", "check"], env=env, capture_output=True, text=True)
    expect(f"{kind}: the server accepts the configuration", done.returncode == 0, done.stdout + done.stderr)


def check_schemas(rendering, expect):
    oldest = re.search(r'kubeVersion: ">=(\d+\.\d+)', (CHART / "Chart.yaml").read_text())[1]
    newest = ".".join(kubernetes_validate.latest_version().split(".")[:2])
    for version in (oldest, newest):
        wrong = []
        for manifest in rendering.manifests:
            try:
                used = kubernetes_validate.validate(manifest, version, strict=True)
                # If the library has no schemas for a version, it silently uses those of an older version.
                if used != version:
                    wrong.append(f"validated against Kubernetes {used}")
            except (kubernetes_validate.ValidationError, kubernetes_validate.SchemaNotFoundError) as error:
                wrong.append(f"{manifest['kind']}: {error.message}")
        expect(f"every manifest is valid in Kubernetes {version}", not wrong, "; ".join(wrong))


def check_pod_security(kind, rendering, expect):
    """Checks the "restricted" pod security standard and the stricter rules of this chart."""
    pod, container, context = rendering.pod(kind), rendering.container(kind), rendering.pod(kind)["securityContext"]
    expect(f"{kind}: the pod runs as non-root under the runtime's seccomp profile",
           context.get("runAsNonRoot") is True and context.get("runAsUser") != 0
           and context.get("seccompProfile") == {"type": "RuntimeDefault"}, context)
    expect.same(f"{kind}: the container cannot gain privileges, has no capabilities and a read-only root filesystem",
                container.get("securityContext"), {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True,
                                                   "capabilities": {"drop": ["ALL"]}})
    forbidden = [name for name in ("hostNetwork", "hostPID", "hostIPC", "initContainers") if pod.get(name)]
    allowed = {"name", "configMap", "projected", "persistentVolumeClaim", "emptyDir"}
    forbidden += [volume for volume in pod.get("volumes", []) if not set(volume) <= allowed]
    expect(f"{kind}: no namespace or volume of the host, no init container", not forbidden, forbidden)
    expect(f"{kind}: no service account token", pod.get("automountServiceAccountToken") is False)
    expect(f"{kind}: no service links in the environment", pod.get("enableServiceLinks") is False)
    expect(f"{kind}: the container has a memory limit", container["resources"]["limits"].get("memory"))
    mounted = sorted(mount["name"] for mount in container.get("volumeMounts", []))
    expect.same(f"{kind}: every volume is mounted", mounted, sorted(rendering.volumes(kind)))


def check_secret_files(kind, rendering, expect):
    if kind == "Deployment":
        settings = [item for section in rendering.toml.values() for item in section.items()]
    else:
        settings = [(name.lower(), value) for name, value in rendering.env(kind).items()]
    named = [value for name, value in settings if name.endswith("_file")]
    named += [path for name, paths in settings if name.endswith("_files") for path in paths]
    # The CA of the store has no setting: the url of the store names the file.
    mounted = [path for path in rendering.secret_files(kind) if not path.endswith("/store-ca.crt")]
    expect.same(f"{kind}: the mounted secret files are those that settings name", sorted(mounted), sorted(named))
    modes = {volume["projected"]["defaultMode"] for volume in rendering.volumes(kind).values() if "projected" in volume}
    expect(f"{kind}: only the owner and the pod's group can read secret files", modes <= {0o440}, modes)


def check_secrets(rendering, expect):
    expect("the chart creates no Secret", "Secret" not in rendering.kinds)
    settings = [name for section in rendering.toml.values() for name in section]
    settings += [name.lower() for kind in rendering.templates for name in rendering.env(kind)]
    secrets = [name for name in settings if re.search("(password|pepper|mac_key|management_url)$", name)]
    expect("no secret setting in the ConfigMap or the environment", not secrets, secrets)
    expect("no url contains a password", not re.search(r"://[^/\s@]*:[^/\s@]*@|password=", rendering.text))
    mounted = any(path.endswith("/store-management-url") for path in rendering.secret_files("Deployment"))
    expect.same("the server pods get the management url only with management.inPods", mounted,
                rendering.name == "everything")


def check_server(rendering, expect):
    container, env = rendering.container("Deployment"), rendering.env("Deployment")
    host = "[::]" if rendering.name == "everything" else "0.0.0.0"
    addresses = env.get("TRUSTGATE__GRPC__LISTEN"), env.get("TRUSTGATE__ADMIN__LISTEN")
    expect.same(f"the server listens on {host}", addresses, (f"{host}:50051", f"{host}:9180"))
    expect("no listener in the configuration file", not rendering.toml.keys() & {"grpc", "admin", "api"})
    expect.same("the pod runs `serve`", (container.get("command"), container["args"]), (None, ["serve"]))
    expect(f"the image is a release or a digest: {container['image']}",
           re.search(r"(:\d+\.\d+\.\d+|@sha256:[0-9a-f]{64})$", container["image"]))
    directory, _, file = env["TRUSTGATE_CONFIG"].rpartition("/")
    mount = rendering.mounts("Deployment")[directory]
    volume = rendering.volumes("Deployment")[mount["name"]]
    config = rendering.kinds["ConfigMap"]
    expect("the pod mounts the whole ConfigMap", volume.get("configMap") == {"name": config["metadata"]["name"]}
           and file in config["data"] and "subPath" not in mount, (mount, volume))
    annotations = rendering.templates["Deployment"]["metadata"]["annotations"]
    checksum = annotations["checksum/config"]
    expect("the pods have a checksum of the configuration", re.fullmatch("[0-9a-f]{64}", checksum))
    limit = size(container["resources"]["limits"]["memory"])
    cache = size(rendering.toml.get("cache", {}).get("size", "128MiB"))
    expect("cache.size is at most half the memory limit", cache * 2 <= limit, (cache, limit))


def check_lifecycle(rendering, expect):
    pod, container = rendering.pod("Deployment"), rendering.container("Deployment")
    for probe, path in (("startupProbe", "/livez"), ("livenessProbe", "/livez"), ("readinessProbe", "/readyz")):
        request = container.get(probe, {}).get("httpGet")
        expect.same(f"{probe} requests {path}", request, {"path": path, "port": "admin"})
    drain = sum(milliseconds(rendering.toml["limits"][name]) for name in ("drain_delay", "drain_grace"))
    spare = pod["terminationGracePeriodSeconds"] * 1000 - drain
    expect("the drain ends 3 to 10 s before the kubelet kills the pod", 3_000 <= spare < 10_000, f"{spare} ms left")
    several = rendering.kinds["Deployment"]["spec"]["replicas"] > 1
    expect.same("several replicas have a disruption budget", "PodDisruptionBudget" in rendering.kinds, several)
    expect.same("several replicas are spread over nodes", bool(pod.get("topologySpreadConstraints")), several)


def check_network(rendering, expect):
    ports = {port["name"]: port["containerPort"] for port in rendering.container("Deployment")["ports"]}
    expect.same("container ports", ports, {"grpc": 50051, "admin": 9180})
    grpc, metrics = rendering.kinds["Service"]["spec"]["ports"]
    expect.same("Service port grpc is HTTP/2 without TLS", grpc,
                {"name": "grpc", "port": 50051, "targetPort": "grpc", "appProtocol": "kubernetes.io/h2c"})
    expect.same("Service port metrics is the admin listener", metrics,
                {"name": "metrics", "port": 9180, "targetPort": "admin"})

    selector = rendering.kinds["Deployment"]["spec"]["selector"]["matchLabels"]
    for kind, template in rendering.templates.items():
        selected = selector.items() <= template["metadata"]["labels"].items()
        expect.same(f"{kind}: the Service sends checks to its pods: {kind == 'Deployment'}", selected,
                    kind == "Deployment")
    expect.same("the Service selects the server pods", rendering.kinds["Service"]["spec"]["selector"], selector)
    if budget := rendering.kinds.get("PodDisruptionBudget"):
        selected = budget["spec"]["selector"]["matchLabels"]
        expect.same("the disruption budget selects the server pods", selected, selector)
    if policy := rendering.kinds.get("NetworkPolicy"):
        selected = policy["spec"]["podSelector"]["matchLabels"]
        expect.same("the network policy selects the server pods", selected, selector)
        rules = policy["spec"]["ingress"]
        named = [rule for rule in rules if rule["from"] and rule["ports"] in ([{"port": "grpc"}], [{"port": "admin"}])]
        expect("the network policy opens only known ports, and only to named sources", rules and named == rules, rules)


def check_sqlite(rendering, expect):
    spec = rendering.kinds["Deployment"]["spec"]
    expect.same("one replica with the strategy Recreate", (spec["replicas"], spec["strategy"]),
                (1, {"type": "Recreate"}))
    mounts, volumes = rendering.mounts("Deployment"), rendering.volumes("Deployment")
    directory, _, file = rendering.toml["store"]["url"].removeprefix("sqlite://").rpartition("/")
    state = volumes[mounts[directory]["name"]]["persistentVolumeClaim"]["claimName"]
    writable = not mounts[directory].get("readOnly")
    expect("the database is on a writable volume", file == "trustgate.db" and writable)
    if claim := rendering.kinds.get("PersistentVolumeClaim"):
        expect.same("the volume is the chart's claim", state, claim["metadata"]["name"])
        policy = claim["metadata"]["annotations"]["helm.sh/resource-policy"]
        expect.same("`helm uninstall` keeps the claim", policy, "keep")
        expect.same("one node at a time can use the claim", claim["spec"]["accessModes"], ["ReadWriteOnce"])
    else:
        expect.same("the volume is persistence.existingClaim", state, "mine")
    context = rendering.pod("Deployment")["securityContext"]
    expect("the volume's group can write, and files keep their mode",
           context.get("fsGroup") and context.get("fsGroupChangePolicy") == "OnRootMismatch", context)
    expect("/tmp is writable", "emptyDir" in volumes[mounts["/tmp"]["name"]])


def check_postgres(rendering, expect):
    expect.same("an upgrade keeps the number of pods", rendering.kinds["Deployment"]["spec"]["strategy"],
                {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}})
    kinds = {kind for volume in rendering.volumes("Deployment").values() for kind in volume if kind != "name"}
    expect("the pods have no disk", kinds <= {"configMap", "projected"}, kinds)


def check_migration(rendering, expect):
    hook = {name: value for name, value in rendering.kinds["Job"]["metadata"]["annotations"].items() if "hook" in name}
    expect.same("the Job runs before install and upgrade, and helm keeps it if it fails", hook,
                {"helm.sh/hook": "pre-install,pre-upgrade",
                 "helm.sh/hook-delete-policy": "before-hook-creation,hook-succeeded"})
    container = rendering.container("Job")
    expect.same("the Job runs `migrate` from the server's image",
                (container.get("command"), container["args"], container["image"]),
                (None, ["migrate"], rendering.container("Deployment")["image"]))
    # helm runs the hooks of a first install before it creates any other object.
    needed = [name for name in ("serviceAccount", "configMap") if name in str(rendering.pod("Job"))]
    expect("the Job uses no other object of the release", not needed, needed)
    env = {name: value for name, value in rendering.env("Job").items() if name.startswith("TRUSTGATE__STORE__")}
    management = env.pop("TRUSTGATE__STORE__MANAGEMENT_URL_FILE", None)
    store = {name: value for name, value in rendering.toml["store"].items() if name != "management_url_file"}
    text = {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in store.items()}
    expect.same("the Job has the server's settings of the database", env,
                {f"TRUSTGATE__STORE__{name.upper()}": value for name, value in text.items()})
    expect.same("the Job has the management url if one is set", rendering.secret_files("Job").get(management),
                None if rendering.name == "postgres-one-replica" else "management-url")


# --- Several renderings, and the chart's own files --------------------------------------------------------------------


def check_pairs(helm, expect):
    """Compares renderings with each other, and values with the rendered configuration."""

    def checksum(*arguments):
        return re.search("checksum/config: ([0-9a-f]+)", helm.render(*sets(*arguments)))[1]

    expect("a changed setting changes the checksum", checksum() != checksum("config.log.level=debug"))
    expect("an added secret changes the checksum", checksum() != checksum(*secret("pepper")))
    expect("image and replicas do not change the checksum", checksum() == checksum("image.tag=2.0.0", "replicas=0"))
    for name in ("postgres", "attached", "everything"):
        given = yaml.safe_load((CHART / f"ci/{name}-values.yaml").read_text())["config"]
        config = Rendering(name, helm.render(*values(name))).toml
        # Compares with repr, because 8 and 8.0 are equal in Python but different in TOML.
        lost = [f"{section}.{setting}" for section, settings in given.items() for setting, value in settings.items()
                if repr(config.get(section, {}).get(setting)) != repr(value)]
        expect(f"the configuration has every setting of ci/{name}-values.yaml unchanged", not lost, lost)

    def policy(**settings):
        given = json.dumps({"enabled": True, **settings})
        return Rendering("", helm.render("--set-json", f"networkPolicy={given}")).kinds["NetworkPolicy"]["spec"]

    expect.same("a network policy without sources allows no incoming connection", policy(grpcFrom=[])["ingress"], [])
    expect.same("a network policy does not restrict outgoing connections by default", policy()["policyTypes"],
                ["Ingress"])
    closed = policy(egress=[])
    expect("a network policy with an empty egress allows no outgoing connection",
           "Egress" in closed["policyTypes"] and not closed.get("egress"), closed)
    long = Rendering("", helm.render(*values("postgres"), *sets(f"fullnameOverride={'long-' * 20}")))
    names = [manifest["metadata"]["name"] for manifest in long.manifests]
    label = "[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
    expect("long names are cut to DNS labels", all(re.fullmatch(label, name) for name in names), names)


def check_notes(helm, expect):
    def notes(*arguments):
        code, output = helm("install", "edge", CHART, "--namespace", "auth", "--dry-run=client", *arguments)
        assert code == 0, output
        return output.partition("\nNOTES:\n")[2]

    text = notes()
    for command in ("trust create acme", "key issue --trust acme"):
        line = f"kubectl -n auth exec deploy/edge-trustgate -- trustgate {command}\n"
        expect(f"the notes explain how to run `{command}`", line in text, text)
    envoy = yaml.safe_load(re.search(r"^ +http_filters:.*?(?=^   \S)", text, re.DOTALL | re.MULTILINE)[0])
    filter, cluster = envoy["http_filters"][0]["typed_config"], envoy["clusters"][0]
    target = filter["grpc_service"]["envoy_grpc"]["cluster_name"]
    expect.same("Envoy's filter fails closed", filter["failure_mode_allow"], False)
    expect.same("Envoy's filter sends checks to the cluster", target, cluster["name"])
    (endpoint,) = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"]
    expect.same("Envoy's cluster is the Service", endpoint["endpoint"]["address"]["socket_address"],
                {"address": "edge-trustgate.auth.svc.cluster.local", "port_value": 50051})
    text = notes(*values("postgres"))
    elsewhere = "     trustgate trust create acme\n" in text and " exec " not in text
    expect("no kubectl exec if the pods have no management url", elsewhere, text)
    text = notes(*values("attached"))
    expect("the notes issue no key in an existing table", " issue" not in text and "exec -i deploy" in text, text)


def check_chart(expect):
    """Compares the files of the chart with each other and with the crate."""
    schema = json.loads((CHART / "values.schema.json").read_text())
    jsonschema.Draft7Validator.check_schema(schema)
    known = schema["properties"]
    # Helm passes `global` to every subchart. supplementalGroups is the only value without a default.
    names = {name: set(value.get("properties", [])) - {"supplementalGroups"} for name, value in known.items()}
    del names["global"]
    defaults = yaml.safe_load((CHART / "values.yaml").read_text())
    expect.same("values.yaml and its schema name the same values", set(defaults), set(names))
    for name, parts in sorted(names.items()):
        if parts and name != "config":
            expect.same(f"values.yaml and its schema name the same values in {name}", set(defaults[name]), parts)
    readme = (CHART / "README.md").read_text()
    missing = [name for name in names if not re.search(rf"^\|.*`{name}\b", readme, re.MULTILINE)]
    expect("README.md explains every value", not missing, missing)

    files = [CHART / f"ci/{name}-values.yaml" for name in ("postgres", "attached", "everything")]
    postgres, attached, everything = [yaml.safe_load(file.read_text()) for file in files]
    expect.same("ci/everything-values.yaml sets every value", set(everything), set(names))
    expect.same("ci/everything-values.yaml sets every secret", set(everything["secrets"]), names["secrets"])
    sections = known["config"]["properties"]
    settings = {(section, name) for section in sections for name in sections[section]["properties"]}
    configs = postgres["config"], attached["config"], everything["config"]
    covered = {(section, name) for config in configs for section in config for name in config[section]}
    # Another rendering sets the preset.
    expect.same("the files in ci/ set every setting", covered | {("store", "preset")}, settings)
    crate = tomllib.loads((ROOT / "Cargo.toml").read_text())["package"]["version"]
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    expect.same("appVersion is the crate's version", chart["appVersion"], crate)


# --- The image --------------------------------------------------------------------------------------------------------


def check_image(expect):
    """Checks the Dockerfile without building it."""
    hadolint = [Path(sys.prefix) / "bin/hadolint", "--no-color", ROOT / "Dockerfile"]
    done = subprocess.run(hadolint, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    expect("hadolint reports nothing", done.returncode == 0 and not done.stdout, done.stdout)

    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    text = re.sub(r" +", " ", "\n".join(lines).replace("\\\n", " "))
    build, final = [stage for stage in re.split("^(?=FROM )", text, flags=re.MULTILINE) if stage.strip()]
    manifest = tomllib.loads((ROOT / "Cargo.toml").read_text())
    rust = manifest["package"]["rust-version"]
    expect.same(f"the build uses Rust {rust} and the Debian release of the final image",
                (build.splitlines()[0], final.splitlines()[0]),
                (f"FROM rust:{rust}-slim-bookworm AS build", "FROM gcr.io/distroless/cc-debian12:nonroot"))
    expect("the build uses the lock file", " cargo build --release --locked " in build)
    expect("the build knows the commit", "\nARG TRUSTGATE_COMMIT" in build.partition("cargo build")[0])
    env = re.search("^ENV (.*)$", final, re.MULTILINE)[1].split()
    for setting in ("TRUSTGATE__GRPC__LISTEN=0.0.0.0:50051", "TRUSTGATE__ADMIN__LISTEN=0.0.0.0:9180",
                    "STATE_DIRECTORY=/var/lib/trustgate"):
        expect(setting, setting in env, env)
    expect("the user is a number and not root", "\nUSER 65532:65532\n" in final)
    # The program is in PATH, for `kubectl exec ... trustgate`.
    for line in ("COPY --from=build /out/trustgate /usr/local/bin/trustgate", 'ENTRYPOINT ["/usr/local/bin/trustgate"]',
                 'CMD ["serve"]'):
        expect(line, line in final.splitlines())

    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    first, *included = [line for line in ignore if line and not line.startswith("#")]
    is_allow_list = first == "*" and all(line.startswith("!") for line in included)
    expect("the build context is an allow-list", is_allow_list, ignore)
    needed = {"Cargo.toml", "Cargo.lock", "src"} | files_the_build_reads(manifest)
    missing = needed - {line.removeprefix("!") for line in included}
    expect("the build context has every file that the build reads", not missing, missing)


def files_the_build_reads(manifest):
    """Returns the top-level names of the files that the manifest's targets and the sources' `include_str!` need."""
    targets = [target for kind in ("bin", "test", "bench", "example") for target in manifest.get(kind, [])]
    paths = [ROOT / target["path"] for target in targets if "path" in target]
    paths += [path for path in [ROOT / "build.rs"] if path.exists()]
    for source in (ROOT / "src").rglob("*.rs"):
        # Ignores the tests at the end of a file, because the image does not contain them.
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
