{{- define "driftkeel.name" -}}
{{- .Release.Name | trunc 52 | trimSuffix "-" -}}
{{- end -}}

{{- define "driftkeel.selector" -}}
app.kubernetes.io/name: driftkeel
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{/* The site's name in alerts: its job in Prometheus. */}}
{{- define "driftkeel.job" -}}
driftkeel/{{ .Release.Namespace }}/{{ .Release.Name }}
{{- end -}}

{{- define "driftkeel.console" -}}
app.kubernetes.io/name: driftkeel-console
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "driftkeel.labels" -}}
{{ include "driftkeel.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end -}}

{{/* Ports of "host:port,host:port", as JSON. The second argument is the port of hosts that name none. */}}
{{- define "driftkeel.portsOf" -}}
{{- $ports := list -}}
{{- range splitList "," (index . 0) -}}
{{- $ports = append $ports (regexFind ":[0-9]+$" (trim .) | trimPrefix ":" | default (index $ 1) | int) -}}
{{- end -}}
{{- $ports | toJson -}}
{{- end -}}

{{/* Ports of Kafka and the store that pods may reach, as JSON: those in the configured addresses, and those listed in
     networkPolicy. */}}
{{- define "driftkeel.egressPorts" -}}
{{- $policy := .Values.networkPolicy -}}
{{- $ports := include "driftkeel.portsOf" (list .Values.config.kafka.bootstrap 9092) | fromJsonArray -}}
{{- $url := .Values.storeUrl -}}
{{- if and (or .Values.secrets.storeUrl.name (contains "sentinel://" $url)) (not $policy.storePorts) -}}
{{- fail "networkPolicy.storePorts: list the ports of the store here; the chart cannot read them from a URL in a Secret, and a Sentinel URL does not name them" -}}
{{- end -}}
{{- if not (or .Values.secrets.storeUrl.name (hasPrefix "unix:" $url)) -}}
{{- $hosts := regexReplaceAll "[/?].*$" (regexReplaceAll "^[a-z+]+://([^@]*@)?" $url "") "" -}}
{{- $ports = concat $ports (include "driftkeel.portsOf" (list $hosts (ternary 26379 6379 (contains "sentinel://" $url))) | fromJsonArray) -}}
{{- end -}}
{{- $all := list -}}
{{- range concat $ports $policy.kafkaPorts $policy.storePorts -}}
{{- $all = append $all (int .) -}}
{{- end -}}
{{- $all | uniq | toJson -}}
{{- end -}}
