{{/* 52 characters leave room for the longest suffix, "-migrate", within the 63 characters of a DNS label. */}}
{{- define "trustgate.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 52 | trimSuffix "-" -}}
{{- end -}}

{{- define "trustgate.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 52 | trimSuffix "-" -}}
{{- else -}}
{{- $name := include "trustgate.name" . -}}
{{- $both := printf "%s-%s" .Release.Name $name -}}
{{- ternary .Release.Name $both (contains $name .Release.Name) | trunc 52 | trimSuffix "-" -}}
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

{{/* The component separates server pods from migration pods. Without it the Service would send checks to the Job. */}}
{{- define "trustgate.selector" -}}
app.kubernetes.io/name: {{ include "trustgate.name" .root }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{/* Labels of pods. They have no versions, so that a new chart version does not replace every pod. */}}
{{- define "trustgate.podLabels" -}}
{{- mergeOverwrite (deepCopy .root.Values.podLabels) (fromYaml (include "trustgate.selector" .)) | toYaml -}}
{{- end -}}

{{- define "trustgate.labels" -}}
{{ include "trustgate.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- end -}}

{{/* "postgres" if the values name a PostgreSQL database, else "sqlite" for the embedded database. */}}
{{- define "trustgate.store" -}}
{{- if or (dig "store" "url" "" .Values.config) (dig "storeUrl" "name" "" .Values.secrets) -}}
postgres
{{- else -}}
sqlite
{{- end -}}
{{- end -}}

{{/*
Every secret with the name of its file and the setting that names this file. `migrate: true`: the migration Job also
needs the secret. storeCa has no setting: the url's sslrootcert names its file.
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
The secrets of a pod, as {files: [{name, key, file}], settings: {section: {setting: path}}}. The `component` is "server"
or "migrate".
*/}}
{{- define "trustgate.secrets" -}}
{{- $dir := include "trustgate.secretDir" . -}}
{{- $server := eq .component "server" -}}
{{- $values := .root.Values -}}
{{- $files := list -}}
{{- $settings := dict -}}
{{- range $secret, $entry := fromYaml (include "trustgate.secretTable" .) -}}
{{- $ref := get $values.secrets $secret | default dict -}}
{{- $wanted := or $server $entry.migrate -}}
{{- if and $server (eq $secret "storeManagementUrl") -}}
{{- $wanted = $values.management.inPods -}}
{{- end -}}
{{- if and $ref.name $wanted -}}
{{- $files = append $files (dict "name" $ref.name "key" $ref.key "file" $entry.file) -}}
{{- if $entry.setting -}}
{{- $section := get $settings $entry.section | default dict -}}
{{- $_ := set $section $entry.setting (printf "%s/%s" $dir $entry.file) -}}
{{- $_ := set $settings $entry.section $section -}}
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

{{/* One volume for all secrets, mounted without subPath: such a file would never change with its Secret. */}}
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

{{/* The configuration file. JSON strings, numbers, booleans and arrays of strings are also valid TOML. */}}
{{- define "trustgate.toml" -}}
{{- $secrets := fromYaml (include "trustgate.secrets" (dict "root" . "component" "server")) -}}
{{- $config := mergeOverwrite (deepCopy .Values.config) $secrets.settings -}}
{{- if eq (include "trustgate.store" .) "sqlite" -}}
{{- $url := printf "sqlite://%s/trustgate.db" (include "trustgate.stateDir" .) -}}
{{- $config = mergeOverwrite $config (dict "store" (dict "url" $url)) -}}
{{- end -}}
# The chart generates this file from its values. The listeners are in the pod's environment, which overrides the file.
{{- range $section, $settings := $config }}
{{- if $settings }}

[{{ $section }}]
{{- range $name, $value := $settings }}
{{ $name }} = {{ toRawJson $value }}
{{- end }}
{{- end }}
{{- end }}
{{- end -}}

{{/* The milliseconds of a duration such as "5s". The schema accepts only one number with one unit. */}}
{{- define "trustgate.milliseconds" -}}
{{- $number := regexFind "^[0-9]+" . | int64 -}}
{{- $unit := regexFind "[a-z]+$" . -}}
{{- mul $number (get (dict "ms" 1 "s" 1000 "m" 60000 "h" 3600000) $unit) -}}
{{- end -}}

{{/* 5 s more than the delay and the grace period of the drain together, because SIGKILL would cut off answers. */}}
{{- define "trustgate.terminationGracePeriodSeconds" -}}
{{- $delay := include "trustgate.milliseconds" .Values.config.limits.drain_delay | int64 -}}
{{- $grace := include "trustgate.milliseconds" .Values.config.limits.drain_grace | int64 -}}
{{- add 5 (div (add $delay $grace 999) 1000) -}}
{{- end -}}

{{/* The "restricted" pod security standard. The values can set the ids but cannot weaken the rest. */}}
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

{{/* The part of the pod specification that server and migration pods share. */}}
{{- define "trustgate.podCommon" -}}
# The pod never calls the Kubernetes API, so it gets no token that could be stolen.
automountServiceAccountToken: false
# For a Service named "trustgate", service links would set TRUSTGATE_PORT and similar variables among the settings.
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
Rules about several values, which the schema cannot express. Each message names the value to change.
*/}}
{{- define "trustgate.validate" -}}
{{- $storeUrl := dig "store" "url" "" .Values.config -}}
{{- $redisUrl := dig "redis" "url" "" .Values.config -}}
{{- $secrets := .Values.secrets -}}
{{- $storeUrlSecret := dig "storeUrl" "name" "" $secrets -}}
{{- $redisUrlSecret := dig "redisUrl" "name" "" $secrets -}}
{{- $sqlite := eq (include "trustgate.store" .) "sqlite" -}}
{{- if hasPrefix "sqlite:" $storeUrl -}}
{{- fail "config.store.url names a SQLite file: leave it out, because the chart sets the path of the database" -}}
{{- end -}}
{{- if and $sqlite (gt (int .Values.replicas) 1) -}}
{{- $problem := "replicas is %d, but the embedded SQLite database allows exactly one pod" -}}
{{- $remedy := "set replicas to 1, or name a PostgreSQL database in config.store.url or secrets.storeUrl" -}}
{{- fail (printf (printf "%s: %s" $problem $remedy) (int .Values.replicas)) -}}
{{- end -}}
{{- if and $storeUrl $storeUrlSecret -}}
{{- fail "config.store.url and secrets.storeUrl are both set: keep one" -}}
{{- end -}}
{{- if and $redisUrl $redisUrlSecret -}}
{{- fail "config.redis.url and secrets.redisUrl are both set: keep one" -}}
{{- end -}}
{{- $redisUrls := ternary $redisUrl (list $redisUrl) (kindIs "slice" $redisUrl) -}}
{{- range $section, $urls := dict "store" (list $storeUrl) "redis" $redisUrls -}}
{{- range $url := $urls -}}
{{- if or (regexMatch "^[a-z+]+://[^/?#]*:[^/?#]*@" $url) (regexMatch "[?&]password=" $url) -}}
{{- $problem := printf "config.%s.url contains a password, and a ConfigMap is not secret" $section -}}
{{- fail (printf "%s: put the password into a Secret and name that in secrets.%sPassword" $problem $section) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if $sqlite -}}
{{- range $secret := list "storePassword" "storeManagementUrl" "storeCa" -}}
{{- if dig $secret "name" "" $secrets -}}
{{- $problem := printf "secrets.%s is set, but no PostgreSQL database is named" $secret -}}
{{- fail (printf "%s: set config.store.url or secrets.storeUrl" $problem) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if not (or $redisUrl $redisUrlSecret) -}}
{{- range $secret := list "redisPassword" "redisSentinelPassword" "redisMacKey" "redisCa" -}}
{{- if dig $secret "name" "" $secrets -}}
{{- fail (printf "secrets.%s is set, but no Redis is named: set config.redis.url or secrets.redisUrl" $secret) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if and $secrets.previousPeppers (not (dig "pepper" "name" "" $secrets)) -}}
{{- fail "secrets.previousPeppers is set without secrets.pepper: name the current pepper" -}}
{{- end -}}
{{- end -}}
