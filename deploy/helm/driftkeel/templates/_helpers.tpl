{{- define "driftkeel.name" -}}
{{- .Release.Name | trunc 52 | trimSuffix "-" -}}
{{- end -}}

{{- define "driftkeel.selector" -}}
app.kubernetes.io/name: driftkeel
app.kubernetes.io/instance: {{ .Release.Name }}
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
