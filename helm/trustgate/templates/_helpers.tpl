{{/* Names leave room for the longest suffix in use, "-migrate", below the 63 of a DNS label. */}}
{{- define "trustgate.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 52 | trimSuffix "-" -}}
{{- end -}}

{{- define "trustgate.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 52 | trimSuffix "-" -}}
{{- else -}}
{{- $name := include "trustgate.name" . -}}
{{- ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) | trunc 52 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "trustgate.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "trustgate.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- define "trustgate.image" -}}
{{- if .Values.image.digest -}}
{{- printf "%s@%s" .Values.image.repository .Values.image.digest -}}
{{- else -}}
{{- printf "%s:%s" .Values.image.repository (default .Chart.AppVersion .Values.image.tag) -}}
{{- end -}}
{{- end -}}

{{/* The component tells server pods from migration pods: without it the Service would send checks to the Job. */}}
{{- define "trustgate.selector" -}}
app.kubernetes.io/name: {{ include "trustgate.name" .root }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{/* On pods: no versions, which would roll every pod for a change of the chart alone. */}}
{{- define "trustgate.podLabels" -}}
{{- mergeOverwrite (deepCopy .root.Values.podLabels) (fromYaml (include "trustgate.selector" .)) | toYaml -}}
{{- end -}}

{{- define "trustgate.labels" -}}
{{ include "trustgate.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- end -}}

{{/* "postgres" or "sqlite": the embedded database unless another one is named. */}}
{{- define "trustgate.store" -}}
{{- if or (dig "store" "url" "" .Values.config) (dig "storeUrl" "name" "" .Values.secrets) -}}postgres{{- else -}}sqlite{{- end -}}
{{- end -}}

{{/*
What can be a secret: the file it becomes, and the setting that names the file. `migrate`: the Job needs it too.
storeCa has no setting; the url's sslrootcert names its file.
*/}}
{{- define "trustgate.secretTable" -}}
storeUrl: {file: store-url, section: store, setting: url_file, migrate: true}
storePassword: {file: store-password, section: store, setting: password_file, migrate: true}
storeManagementUrl: {file: store-management-url, section: store, setting: management_url_file, migrate: true}
storeCa: {file: store-ca.crt, migrate: true}
redisUrl: {file: redis-url, section: redis, setting: url_file}
redisPassword: {file: redis-password, section: redis, setting: password_file}
redisSentinelPassword: {file: redis-sentinel-password, section: redis, setting: sentinel_password_file}
redisMacKey: {file: redis-mac-key, section: redis, setting: mac_key_file}
redisCa: {file: redis-ca.crt, section: redis, setting: ca_file}
pepper: {file: pepper, section: credential, setting: pepper_file}
{{- end -}}

{{- define "trustgate.secretDir" -}}/run/secrets/trustgate{{- end -}}

{{/*
The secrets that a pod gets, as {files: [{name, key, file}], settings: {section: {setting: path}}}, for the
`component` "server" or "migrate".
*/}}
{{- define "trustgate.secrets" -}}
{{- $dir := include "trustgate.secretDir" . -}}
{{- $server := eq .component "server" -}}
{{- $values := .root.Values -}}
{{- $files := list -}}
{{- $settings := dict -}}
{{- range $what, $to := fromYaml (include "trustgate.secretTable" .) -}}
{{- $ref := get $values.secrets $what | default dict -}}
{{- $wanted := or $server $to.migrate -}}
{{- if and $server (eq $what "storeManagementUrl") -}}
{{- $wanted = $values.management.inPods -}}
{{- end -}}
{{- if and $ref.name $wanted -}}
{{- $files = append $files (dict "name" $ref.name "key" $ref.key "file" $to.file) -}}
{{- if $to.setting -}}
{{- $section := get $settings $to.section | default dict -}}
{{- $_ := set $section $to.setting (printf "%s/%s" $dir $to.file) -}}
{{- $_ := set $settings $to.section $section -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if and $server $values.secrets.previousPeppers -}}
{{- $paths := list -}}
{{- range $i, $ref := $values.secrets.previousPeppers -}}
{{- $file := printf "previous-pepper-%d" $i -}}
{{- $files = append $files (dict "name" $ref.name "key" $ref.key "file" $file) -}}
{{- $paths = append $paths (printf "%s/%s" $dir $file) -}}
{{- end -}}
{{- $section := get $settings "credential" | default dict -}}
{{- $_ := set $section "previous_pepper_files" $paths -}}
{{- $_ := set $settings "credential" $section -}}
{{- end -}}
{{- dict "files" $files "settings" $settings | toYaml -}}
{{- end -}}

{{/* One volume for all of them; no subPath, which would never see a changed Secret. */}}
{{- define "trustgate.secretVolume" -}}
- name: secrets
  projected:
    defaultMode: 0440
    sources:
      {{- range . }}
      - secret:
          name: {{ .name | quote }}
          items:
            - key: {{ .key | quote }}
              path: {{ .file }}
      {{- end }}
{{- end -}}

{{- define "trustgate.stateDir" -}}/var/lib/trustgate{{- end -}}

{{/* The configuration file. A JSON string, number, boolean or array of strings is the same thing in TOML. */}}
{{- define "trustgate.toml" -}}
{{- $secrets := fromYaml (include "trustgate.secrets" (dict "root" . "component" "server")) -}}
{{- $config := mergeOverwrite (deepCopy .Values.config) $secrets.settings -}}
{{- if eq (include "trustgate.store" .) "sqlite" -}}
{{- $url := printf "sqlite://%s/trustgate.db" (include "trustgate.stateDir" .) -}}
{{- $config = mergeOverwrite $config (dict "store" (dict "url" $url)) -}}
{{- end -}}
# Written by the chart from its values. The listeners are in the pod's environment, which wins over this file.
{{- range $section, $settings := $config }}
{{- if $settings }}

[{{ $section }}]
{{- range $name, $value := $settings }}
{{ $name }} = {{ toRawJson $value }}
{{- end }}
{{- end }}
{{- end }}
{{- end -}}

{{/* Milliseconds of "5s"; the schema lets only one number and one unit through. */}}
{{- define "trustgate.milliseconds" -}}
{{- $number := regexFind "^[0-9]+" . | int64 -}}
{{- $unit := regexFind "[a-z]+$" . -}}
{{- mul $number (get (dict "ms" 1 "s" 1000 "m" 60000 "h" 3600000) $unit) -}}
{{- end -}}

{{/* The server's own drain (delay, then grace) ends before the kubelet's patience does: SIGKILL cuts answers off. */}}
{{- define "trustgate.terminationGracePeriodSeconds" -}}
{{- $delay := include "trustgate.milliseconds" .Values.config.limits.drain_delay | int64 -}}
{{- $grace := include "trustgate.milliseconds" .Values.config.limits.drain_grace | int64 -}}
{{- add 5 (div (add $delay $grace 999) 1000) -}}
{{- end -}}

{{/* The "restricted" pod security standard. Values may choose the ids, not weaken the rest. */}}
{{- define "trustgate.podSecurityContext" -}}
{{- $fixed := dict "runAsNonRoot" true "seccompProfile" (dict "type" "RuntimeDefault") -}}
{{- mergeOverwrite (deepCopy .Values.podSecurityContext) $fixed | toYaml -}}
{{- end -}}

{{- define "trustgate.securityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{/* What both kinds of pod say before their containers. */}}
{{- define "trustgate.podCommon" -}}
# It never talks to the Kubernetes API: no token to steal.
automountServiceAccountToken: false
# A Service called "trustgate" would put TRUSTGATE_PORT and the like into the environment, beside our settings.
enableServiceLinks: false
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
securityContext:
  {{- include "trustgate.podSecurityContext" . | nindent 2 }}
{{- with .Values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .Values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/*
What the schema cannot say because it is about several values. One message each, naming the value to change.
*/}}
{{- define "trustgate.validate" -}}
{{- $storeUrl := dig "store" "url" "" .Values.config -}}
{{- $redisUrl := dig "redis" "url" "" .Values.config -}}
{{- $secrets := .Values.secrets -}}
{{- $storeUrlSecret := dig "storeUrl" "name" "" $secrets -}}
{{- $redisUrlSecret := dig "redisUrl" "name" "" $secrets -}}
{{- $sqlite := eq (include "trustgate.store" .) "sqlite" -}}
{{- if hasPrefix "sqlite:" $storeUrl -}}
{{- fail "config.store.url names a SQLite file: leave it out, the chart puts the database on its volume" -}}
{{- end -}}
{{- if and $sqlite (gt (int .Values.replicas) 1) -}}
{{- fail (printf "replicas is %d, but the embedded SQLite database belongs to exactly one pod: set replicas to 1, or name a PostgreSQL database in config.store.url or secrets.storeUrl" (int .Values.replicas)) -}}
{{- end -}}
{{- if and $storeUrl $storeUrlSecret -}}
{{- fail "config.store.url and secrets.storeUrl are both set: keep one" -}}
{{- end -}}
{{- if and $redisUrl $redisUrlSecret -}}
{{- fail "config.redis.url and secrets.redisUrl are both set: keep one" -}}
{{- end -}}
{{- $redisUrls := ternary $redisUrl (list $redisUrl) (kindIs "slice" $redisUrl) -}}
{{- range $what, $urls := dict "store" (list $storeUrl) "redis" $redisUrls -}}
{{- range $url := $urls -}}
{{- if or (regexMatch "^[a-z+]+://[^/?#]*:[^/?#]*@" $url) (regexMatch "[?&]password=" $url) -}}
{{- fail (printf "config.%s.url holds a password, and a ConfigMap is no secret: put it into a Secret and name that in secrets.%sPassword" $what $what) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if $sqlite -}}
{{- range $what := list "storePassword" "storeManagementUrl" "storeCa" -}}
{{- if dig $what "name" "" $secrets -}}
{{- fail (printf "secrets.%s is set, but no PostgreSQL database is named in config.store.url or secrets.storeUrl" $what) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if not (or $redisUrl $redisUrlSecret) -}}
{{- range $what := list "redisPassword" "redisSentinelPassword" "redisMacKey" "redisCa" -}}
{{- if dig $what "name" "" $secrets -}}
{{- fail (printf "secrets.%s is set, but no Redis is named in config.redis.url or secrets.redisUrl" $what) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if and $secrets.previousPeppers (not (dig "pepper" "name" "" $secrets)) -}}
{{- fail "secrets.previousPeppers is set without secrets.pepper: name the pepper they make way for" -}}
{{- end -}}
{{- end -}}
